"""Probes in runs and in evaluations of runs: what is written, resumed, refused and foretold."""

import dataclasses
import json
import shutil

import pandas as pd
import pytest
from conftest import SMOKE, run_directory

from cu_runner.cli import doctor, evaluate
from cu_runner.evaluators import evaluate as drawing
from cu_runner.schema.errors import StoreError
from cu_runner.store.proof import require_metrics
from cu_runner.store.run_record import read_run

LIST = "recovery.paraphrase.prompts=paraphrases_shapecanvas_styles"
CHEAP = (
    "recovery=[paraphrase,completion,residual,rebound]",
    LIST,
    "recovery.paraphrase.images=1",
    "recovery.paraphrase.controls=1",
    "recovery.completion.images=1",
    "recovery.completion.controls=1",
)
RELEARN = (
    "recovery=[relearning]",
    "recovery.relearning.steps=[0,1,2]",
    "recovery.relearning.data=[own]",
    "recovery.relearning.examples=2",
    "recovery.relearning.batch_size=1",
    "recovery.relearning.images=1",
    "recovery.relearning.controls=1",
)


@pytest.fixture
def probed(in_process, tmp_path):
    """The directory of a small run with the cheap probes."""
    status, out, err = in_process(*SMOKE, *CHEAP)
    assert (status, err) == (0, "")
    assert "recovered: paraphrase" in out
    directory = run_directory(out, tmp_path)
    last = pd.read_csv(directory / "metrics.csv").iloc[-1]
    names = ("", "_untouched", "_retained")
    cells = (last[f"recovered_completion{name}"] for name in names)
    assert "{:.1f} [{:.1f}, {:.1f}] ".format(*cells) in out.splitlines()[-5]
    assert "[-" not in out  # a rebound has no controls
    return directory


@pytest.fixture
def cu_eval(call_command):
    return lambda *arguments: call_command(evaluate.main, "cu-eval", *arguments)


def test_a_run_writes_what_its_probes_saw_and_goes_on_bitwise(probed, in_process, tmp_path):
    run = read_run(probed)
    assert "recovery.csv" not in run.records[0].files
    rows = pd.read_csv(probed / "steps/02/recovery.csv")
    assert set(rows["probe"]) == {"paraphrase", "completion"}
    assert set(zip(rows["group"], rows["weights"], strict=True)) == {
        (group, weights) for group in ("erased", "retained") for weights in ("edited", "untouched")
    }
    values = pd.read_csv(probed / "steps/02/recovery_values.csv")
    assert set(values["probe"]) == {"residual", "rebound"}
    last = run.records[2].row.metrics
    own = rows[(rows["probe"] == "completion") & (rows["weights"] == "edited")]
    own = own[own["group"] == "erased"]
    shares = (own["style"] == own["predicted_style"]).groupby(own["dose"]).mean()
    assert last["recovered_completion"] == pytest.approx(100 * shares.max())
    worst = max(100 - last["UA"], last["recovered_completion"], last["recovered_paraphrase"])
    assert last["UA_worst"] == pytest.approx(100 - worst)
    assert json.loads((probed / "steps/02/metrics.json").read_text()) == last
    before = {p.name: p.read_bytes() for p in (probed / "steps/02").iterdir() if p.suffix == ".csv"}
    for cache in (True, False):
        shutil.rmtree(probed / "steps/02")
        if not cache:
            shutil.rmtree(tmp_path / "outputs/cache")
        status, _, err = in_process(*SMOKE, *CHEAP)
        assert (status, err) == (0, "")
        assert {
            p.name: p.read_bytes() for p in (probed / "steps/02").iterdir() if p.suffix == ".csv"
        } == before


def test_what_probes_saw_is_checked_as_predictions_are(probed, in_process, call_command):
    status, out, _ = call_command(doctor.main, "cu-doctor", probed)
    assert status == 0
    assert "30 checks, all well" in out  # four of them are of the files of probes
    run = read_run(probed)
    require_metrics(run, 2)
    record = run.records[2]
    other = {**record.row.metrics, "recovered_completion": 77.0}
    run.records[2] = dataclasses.replace(record, row=dataclasses.replace(record.row, metrics=other))
    with pytest.raises(StoreError, match="recovered_completion"):
        require_metrics(run, 2)
    file = probed / "steps/01/recovery.csv"
    file.write_bytes(file.read_bytes().replace(b"edited", b"edifed", 1))
    status, _, err = in_process(*SMOKE, *CHEAP)
    assert status == 1
    assert "recovery.csv: is damaged" in err


def test_a_finished_run_is_probed_without_drawing_its_evaluation_again(
    cu_eval, run_copy, tmp_path, monkeypatch, in_process
):
    monkeypatch.setattr("cu_runner.runner.measure.evaluate", None)
    drawn = []
    look_at = drawing.look_at
    monkeypatch.setattr(
        "cu_runner.recovery.drawing.look_at",
        lambda judge, number, *words: drawn.append(number) or look_at(judge, number, *words),
    )
    status, out, err = cu_eval(run_copy, *CHEAP)
    assert (status, err) == (0, "")
    assert "recovered: paraphrase" in out
    directory = tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")
    for index in (0, 1, 2):
        assert (directory / f"steps/0{index}/predictions.csv").read_bytes() == (
            run_copy / f"steps/0{index}/predictions.csv"
        ).read_bytes()
    assert sum(drawn) < 30
    assert read_run(directory).table["UA_worst"].notna().sum() == 2
    status, out, _ = cu_eval(run_copy, *CHEAP)
    assert status == 0
    assert "recovered: paraphrase" in out


def test_a_probed_run_is_probed_by_others_without_drawing_its_evaluation_again(
    probed, cu_eval, tmp_path, monkeypatch
):
    monkeypatch.setattr("cu_runner.runner.measure.evaluate", None)
    words = ["recovery.completion.images=1", "recovery=completion"]  # the file comes first
    status, out, err = cu_eval(probed, *words)
    assert (status, err) == (0, "")
    directory = tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")
    for index in (0, 1, 2):
        own, other = (path / f"steps/0{index}/predictions.csv" for path in (probed, directory))
        assert own.read_bytes() == other.read_bytes()
    named = [name for name in read_run(directory).table if "paraphrase" in name]
    assert named == []
    assert read_run(directory).table["recovered_completion"].notna().sum() == 2
    rows = pd.read_csv(directory / "steps/02/recovery.csv")
    concepts = rows[(rows["group"] == "erased") & (rows["weights"] == "edited")]["style"]
    assert set(concepts.value_counts()) == {2}  # one image at each of two shares
    status, _, err = cu_eval(probed, "recovery=completion", "recovery=residual")
    assert (status, err.count("\n")) == (2, 1)
    assert "recovery=...: is there twice" in err


@pytest.mark.slow
def test_objects_have_their_anchors_in_an_evaluation_too(in_process, cu_eval, tmp_path):
    small = [*SMOKE, "sequence=shapecanvas_tune_object", "sequence.targets=[bell,ladder]"]
    small += ["sequence.cross_retain=[bonfire,icicle]", "sequence.retain=[kite,cloud]"]
    small += ["sequence.seeds=[1]", "~sequence.anchors"]
    small += ["+sequence.anchors={bell: mushroom, ladder: cross}"]
    words = [*RELEARN[1:], "recovery.adversarial.generations=2", "recovery.adversarial.images=1"]
    words = ["recovery=[relearning,adversarial]", *words]
    status, out, err = in_process(*small, *words)
    assert (status, err) == (0, "")
    probed = run_directory(out, tmp_path)
    status, out, err = in_process(*small)
    assert (status, err) == (0, "")
    status, out, err = cu_eval(run_directory(out, tmp_path), *words)
    assert (status, err) == (0, "")
    directory = tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")
    own, other = (path / "steps/02/recovery.csv" for path in (probed, directory))
    assert own.read_bytes() == other.read_bytes()


def test_a_file_of_prompts_that_was_edited_is_drawn_anew(in_process, cu_eval, tmp_path):
    table = tmp_path / "mine.csv"

    def write(seed: int) -> None:
        names = ["torch light", "snow drift", "lava flow", "fog bank"]
        rows = [f"a tree image in {name} style,{name},tree,{seed}" for name in names]
        rows += [f"a star image in {name} style,{name},star,{seed}" for name in names]
        table.write_text("\n".join(["prompt,concept,object,seed", *rows]) + "\n", encoding="utf-8")

    write(1)
    status, out, err = in_process(*SMOKE, f"+sequence.prompts={table}")
    assert (status, err) == (0, "")
    run = run_directory(out, tmp_path)
    write(7)
    status, out, err = cu_eval(run, "recovery=completion", "recovery.completion.images=1")
    assert (status, err) == (0, "")
    directory = tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")
    for name in ("predictions.csv", "recovery.csv"):
        assert set(pd.read_csv(directory / "steps/02" / name)["seed"]) == {7}


def test_by_run_and_by_evaluation_are_the_same(probed, cu_eval, in_process, tmp_path):
    status, out, err = in_process(*SMOKE)
    assert (status, err) == (0, "")
    plain = run_directory(out, tmp_path)
    assert plain != probed
    status, out, err = cu_eval(plain, *CHEAP)
    assert (status, err) == (0, "")
    directory = tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")
    for index in (1, 2):
        for name in ("recovery.csv", "recovery_values.csv", "metrics.json"):
            assert (directory / f"steps/0{index}" / name).read_bytes() == (
                probed / f"steps/0{index}" / name
            ).read_bytes()


def test_relearning_after_the_last_request_alone(in_process, tmp_path):
    status, out, err = in_process(*SMOKE, *RELEARN)
    assert (status, err) == (0, "")
    run = read_run(run_directory(out, tmp_path))
    assert run.table["recovered_relearning"].notna().tolist() == [False, False, True]
    assert run.table["recovered_relearning_area"].notna().tolist() == [False, False, True]
    names = list(pd.read_csv(run.directory / "metrics.csv"))
    assert names.index("recovered_relearning_area") < names.index("drift_l2")
    assert "recovery.csv" not in run.records[1].files


def test_a_plan_says_what_the_probes_cost(in_process):
    status, out, _ = in_process(*SMOKE, *CHEAP, "dry_run=true")
    assert status == 0
    # paraphrase 1, completion 2 images of 1 + 1 and 2 + 1 concepts, and of 2 + 1 as a control
    assert "recovery: at most 24 further images and 0 steps" in out
    status, out, _ = in_process(*SMOKE, *RELEARN, "dry_run=true")
    assert "recovery: at most 18 further images and 12 steps" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recovery=nothing"], "nothing"),
        (["recovery=completion", "recovery.completion.shares=[2]"], "shares"),
        (["recovery=completion", "recovery.completion.shares=[]"], "shares: is empty"),
        (["recovery=completion", "recovery.completion.every=0"], "every"),
        (["recovery=paraphrase"], "a vocabulary is a list of names, for which no paraphrases ship"),
        (["recovery=paraphrase", "recovery.paraphrase.prompts=mine.csv"], "no such file"),
        (["+recovery.noise.images=2", "recovery=rebound"], "probe is not selected"),
        (["recovery=relearning", "recovery.relearning.steps=[1,1]"], "steps: has 1 twice"),
        (["recovery=relearning", "recovery.relearning.data=[own,own]"], "data: has 'own' twice"),
        (["recovery=noise", "recovery.noise.etas=[]"], "etas: is empty"),
        (["recovery=precision", "recovery.precision.kinds=[int8,int8]"], "'int8' twice"),
        (
            ["recovery=inversion", 'sequence.target_prompt="{concept} {caption} of {concept}"'],
            "none of the training prompts of",
        ),
        (["recovery=adversarial", "recovery.adversarial.population=2"], "4 prompts"),
        (["recovery=noise", "recovery.noise.etas=[1.85]"], "at most"),
        (["recovery=noise", "recovery.noise.scheduler=Foo"], "recovery.noise.scheduler=Foo"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(in_process, tmp_path, words, said):
    status, _, err = in_process(*SMOKE, *words)
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.glob("outputs/runs/*/*"))


def test_a_probe_of_ones_own_is_a_class_and_a_file(in_process, tmp_path, monkeypatch):
    (tmp_path / "conf/recovery").mkdir(parents=True)
    (tmp_path / "conf/recovery/mine.yaml").write_text(
        "mine:\n  _target_: my_probes.Mine\n  every: 2\n", encoding="utf-8"
    )
    (tmp_path / "my_probes.py").write_text(
        "from cu_runner.recovery.base import Cost, Number, Probe\n\n\n"
        "class Mine(Probe):\n"
        "    def __init__(self, every: int):\n"
        "        super().__init__(every)\n\n"
        "    def measure(self, lab, concepts):\n"
        "        return [Number(concept.name, 7.0) for concept in concepts]\n\n"
        "    def cost(self, sequence, concepts):\n"
        "        return Cost()\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = (f"--config-dir={tmp_path}/conf", *SMOKE, "recovery=mine", "allow_modules=[my_probes]")
    status, out, err = in_process(*own)
    assert (status, err) == (0, "")
    table = read_run(run_directory(out, tmp_path)).table
    assert table["recovered_mine"].tolist()[2] == 7
    assert table["recovered_mine"].isna().tolist() == [True, True, False]
