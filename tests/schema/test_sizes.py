"""Input of a size that no honest use has is refused in one line, at once; large honest input is
composed in seconds.
"""

import json
import lzma
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from commands import assert_one_line
from conftest import SMOKE, read_conf

from cu_runner.cli import doctor
from cu_runner.concepts.entries import read_file
from cu_runner.concepts.prompt_csv import read_prompts
from cu_runner.concepts.requests import plan_requests
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.models.loading import load_model
from cu_runner.reporting.table_spec import read_table
from cu_runner.runner.forecast import plan_work
from cu_runner.schema.errors import ConfigError, ModelError, StoreError, SweepError
from cu_runner.schema.json_files import parse_json
from cu_runner.schema.settings import Sampler
from cu_runner.schema.yaml_files import check_tree, check_yaml
from cu_runner.store.archive import unpack
from cu_runner.store.run_record import run_of_job
from cu_runner.sweeps.job_note import read_job_note

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
OVERSIZED = {
    "bomb": (BOMB, "stands for 1.23e+09 values with its aliases written out; at most 200000"),
    "deep": ("a: " + "{a: " * 400 + "1" + "}" * 400, "has 401 levels inside of one another"),
    "lists": ("[" * 41 + "]" * 41, "has 41 levels inside of one another; at most 40"),
    "large": ("#" * 2_000_001, "has 2 MB; a configuration file has 2 at most"),
    "itself": ("&a [*a]", "stands for 2e+05 values"),
}


@pytest.mark.parametrize(("text", "said"), OVERSIZED.values(), ids=OVERSIZED)
def test_a_yaml_file_that_is_a_bomb_is_refused(in_process, tmp_path, text, said):
    (tmp_path / "tree/experiment").mkdir(parents=True)
    path = tmp_path / "tree/experiment/mine.yaml"
    path.write_text(text, encoding="utf-8")
    began = time.process_time()
    result = in_process(f"--config-dir={tmp_path}/tree", "experiment=mine", *SMOKE)
    assert_one_line(result, 2, ["mine.yaml: ", said])
    with pytest.raises(ConfigError, match=r"mine.yaml: "):
        read_table(str(path))
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["config.yaml", "steps/01/step.json", "steps/01/metrics.json"])
def test_json_that_is_nested_too_deeply_is_damage_of_its_file(run_copy, call_command, name):
    (run_copy / name).write_text(DEEP, encoding="utf-8")
    status, out, err = call_command(doctor.main, "cu-doctor", str(run_copy))
    assert status == 1
    assert name.rpartition("/")[0] in out + err
    assert "recursion" not in out + err
    assert "Traceback" not in out + err


def test_json_of_sweeps_and_models_that_is_nested_too_deeply(pipeline_of, pipelines, tmp_path):
    with pytest.raises(ValueError, match="has too many levels inside of one another"):
        parse_json(DEEP)
    (tmp_path / "job.json").write_text(DEEP, encoding="utf-8")
    for read in (run_of_job, read_job_note):
        with pytest.raises((StoreError, SweepError), match=r"job\.json: cannot be read"):
            read(tmp_path / "job.json")
    directory = pipeline_of("sd15")
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        (directory / file).write_text(DEEP, encoding="utf-8")
        with pytest.raises(ModelError, match=file.partition("/")[0]):
            load_model(str(directory), 64, Sampler(2, 2.0))
        shutil.copy(pipelines["sd15"] / file, directory / file)


def test_ordinary_files_pass(tmp_path):
    for path in (Path(__file__).parent.parent.parent / "conf").rglob("*.yaml"):
        check_yaml(path)
    (tmp_path / "none.yaml").write_text("a: [", encoding="utf-8")  # whoever reads it says so
    check_yaml(tmp_path / "none.yaml")
    check_yaml(tmp_path / "missing.yaml")


def test_a_tree_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("cu_runner.schema.yaml_files.MOST_FILES", 3)
    for number in range(3):
        (tmp_path / f"{number}.yaml").write_text("a: 1")
    check_tree(tmp_path)
    (tmp_path / "more.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="holds more than 3 files of YAML"):
        check_tree(tmp_path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"seed={'9' * 400}", "seed: a whole number of 400 digits; at most 18"),
        (f"train.steps={10**18}", "train.steps: a whole number of 19 digits"),
        (f"+wandb.x={'{a: ' * 400}1{'}' * 400}", "wandb.x: has 400 levels inside of one another"),
        (f"seed={'[' * 300}1{']' * 300}", "seed: has 300 levels inside of one another; at most 40"),
    ],
    ids=lambda text: text[:12],
)
def test_numbers_and_nesting_on_the_command_line(in_process, override, said):
    assert_one_line(in_process(*SMOKE, override), 2, [said])


def test_files_of_too_many_entries_are_refused(tmp_path, monkeypatch):
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,seed\n" + "a,1\n" * 200_001, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^k=.*rows.csv: has over 200000 rows; give fewer"):
        read_prompts("k", str(rows), ("prompt", "seed"))
    rows.write_text("prompt,seed\n" + "a,1\n" * 20_000, encoding="utf-8")
    assert len(read_prompts("k", str(rows), ("prompt", "seed"))) == 20_000
    for module in ("prompt_csv", "entries"):
        monkeypatch.setattr(f"cu_runner.concepts.{module}.LARGEST_FILE", 10)
    with pytest.raises(ValueError, match=r"^k=.*rows.csv: has over 0 MB"):
        read_prompts("k", str(rows), ("prompt", "seed"))
    with pytest.raises(ValueError, match=r"rows.csv: has over 0 MB; give fewer entries"):
        read_file(str(rows))


def test_ten_thousand_targets_and_images_are_planned_in_seconds(tmp_path):
    smoke = read_conf("sequence/smoke.yaml")
    targets = [f"style {number}" for number in range(10_000)]
    began = time.process_time()
    sequence = make_sequence(**smoke | {"targets": targets})
    for plan in ("sequential", "independent", "simultaneous"):
        requests = plan_requests(sequence, plan)
        work = plan_work(sequence, requests, 1, merging=False)
        first, last = (2 + 2) * 2, (10_000 + 2) * 2  # two retained, two objects, one seed
        expected = [6, 6] if plan == "independent" else [6, last]
        assert [work[1].images, work[-1].images] == expected
        assert (work[0].images, work[2].images) == (last, 6 if plan == "independent" else first)
    rows = "prompt,concept,seed,object\n" + "".join(
        f"p{i},{('torch light', 'snow drift', 'lava flow', 'fog bank')[i % 4]},{i},tree\n"
        for i in range(20_000)
    )
    (tmp_path / "rows.csv").write_text(rows, encoding="utf-8")
    own = make_sequence(**smoke | {"prompts": str(tmp_path / "rows.csv")})
    assert [own.num_images(concept) for concept in own.targets] == [5_000, 5_000]
    assert len(own.evaluation_images(own.targets)) == 10_000
    assert time.process_time() - began < 8


def test_an_archive_that_is_a_bomb_or_damaged_inside_is_refused(tmp_path):
    bomb, content = tmp_path / "bomb.zip", b"0" * 20_000_000
    manifest = json.dumps({"config.yaml": "0" * 64})
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("s/r/config.yaml", content)
        archive.writestr("s/r/manifest.json", manifest)
    with pytest.raises(StoreError, match=r"bomb.zip: unpacks to 20 MB, over 100 times its size"):
        unpack(bomb, tmp_path / "out")
    damaged = tmp_path / "damaged.zip"
    with zipfile.ZipFile(damaged, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("s/r/manifest.json", manifest)
        archive.writestr("s/r/config.yaml", bytes(range(256)) * 40)
    packed = bytearray(damaged.read_bytes())
    start = packed.index(b"s/r/config.yaml") + len("s/r/config.yaml")
    packed[start + 6 : start + 60] = bytes(54)
    damaged.write_bytes(packed)
    with pytest.raises((StoreError, lzma.LZMAError)) as caught:
        unpack(damaged, tmp_path / "out")
    assert isinstance(caught.value, StoreError)
    assert not (tmp_path / "out").exists()
