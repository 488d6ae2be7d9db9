"""cu-doctor on run directories and packed runs, and cu-report --pack."""

import hashlib
import json
import os
import random
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import SMOKE, run_directory

from cu_runner.cli import doctor, report
from cu_runner.config.compose import compose
from cu_runner.config.targets import Node
from cu_runner.models.checkpoint_files import locate
from cu_runner.runner import preflight as checkup
from cu_runner.runner.runner import Runner
from cu_runner.runner.training import Training
from cu_runner.runner.weights import TrainedWeights
from cu_runner.schema.errors import ModelError, StoreError
from cu_runner.store.archive import unpack
from cu_runner.store.files import hash_json
from cu_runner.store.records import chain
from cu_runner.store.run_record import read_config


@pytest.fixture
def examine(call_command):
    """Returns examine(path) -> (exit status, the lines that are not well, the last line)."""

    def call(path, *options):
        status, out, err = call_command(doctor.main, "cu-doctor", path, *options)
        assert err == ""
        lines = [line.strip() for line in out.splitlines()]
        assert lines[0] == str(path)
        return status, lines[1:-1], lines[-1]

    return call


def rewrite(step, change) -> None:
    """Change a step.json and make its own hashes fit, as one who forges a number would."""
    record = json.loads((step / "step.json").read_text())
    change(record)
    record["sha256"] = chain(record["parent_sha256"], record["files"])
    entries = {key: value for key, value in record.items() if key != "record_sha256"}
    (step / "step.json").write_text(json.dumps(entries | {"record_sha256": hash_json(entries)}))


def test_a_finished_run_is_well(examine, run_copy):
    assert examine(run_copy) == (0, [], "26 checks, all well")
    status, lines, _ = examine(run_copy, "--all")
    assert status == 0
    assert "ok          weights of the model" in lines
    assert "ok          steps/02: drift from delta.safetensors" in lines


def test_damage_is_found_everywhere_at_once(examine, run_copy):
    delta = run_copy / "steps/01/delta.safetensors"
    content = bytearray(delta.read_bytes())
    content[-1] ^= 1
    delta.write_bytes(content)
    (run_copy / "steps/02/grid.png").unlink()
    (run_copy / "metrics.csv").write_text("request,UA\n1,100\n")
    (run_copy / "steps/02/extra.txt").write_text("")
    status, lines, last = examine(run_copy)
    assert status == 1
    assert [line for line in lines if "drift" not in line] == [
        "WRONG       steps/01/delta.safetensors: is damaged: another sha256 than in step.json",
        "WRONG       steps/02/grid.png: is missing",
        "WRONG       steps/02: holds files that no step names: extra.txt",
        "WRONG       metrics.csv: differs from the steps; the run's own command writes it anew",
    ]
    assert last.endswith("wrong")


def test_a_forged_number_is_found_though_its_hashes_fit(examine, run_copy):
    true = json.loads((run_copy / "steps/02/step.json").read_text())["row"]["RA_I"]
    rewrite(run_copy / "steps/02", lambda record: record["row"].update(RA_I=99.0))
    _, lines, _ = examine(run_copy)
    assert (
        "WRONG       steps/02: metrics from predictions.csv: RA_I is 99.0 in step.json, "
        f"{true} in metrics.json, {true} from"
    ) in lines[0]


def test_a_forged_drift_is_found(examine, run_copy):
    rewrite(
        run_copy / "steps/02",
        lambda record: record["row"].update(drift_l2=record["row"]["drift_l2"] * 1.01),
    )
    _, lines, _ = examine(run_copy)
    assert any(
        line.startswith("WRONG       steps/02: drift from delta.safetensors") for line in lines
    )


def test_a_broken_chain_and_another_base_model_are_found(examine, run_copy):
    rewrite(
        run_copy / "steps/02",
        lambda record: record.update(parent_sha256="0" * 64, evaluator_sha256="0" * 64),
    )
    assert examine(run_copy)[:2] == (
        1,
        [
            (
                "WRONG       steps/02: chain: does not continue the step before it; "
                "evaluator_sha256 is not that of step 0"
            )
        ],
    )
    rewrite(run_copy / "steps/00", lambda record: record.update(model_sha256="0" * 64))
    status, lines, _ = examine(run_copy)
    assert status == 1
    assert "WRONG       steps/00: chain: does not continue the step before it" in lines
    assert "WRONG       weights of the model: are not those that the run began with" in lines


def test_the_chain_begins_with_the_base_model(examine, run_copy, monkeypatch):
    build = Node.build

    def gone(node, **device):
        if device:  # a model or an evaluator
            raise ModelError("no such directory")
        return build(node)

    monkeypatch.setattr(Node, "build", gone)
    status, lines, last = examine(run_copy)
    assert (status, last) == (0, "26 checks, 2 could not be made, the others are well")
    assert lines == [
        f"not checked weights of the {name}: no such directory" for name in ("model", "evaluator")
    ]
    forged = {"model_sha256": "0" * 64, "parent_sha256": "0" * 64}
    rewrite(run_copy / "steps/00", lambda record: record.update(forged))
    assert examine(run_copy)[0] == 1  # the step after it names another


def test_a_run_of_an_older_version_is_refused_in_one_line_that_names_it(call_command, run_copy):
    rewrite(run_copy / "steps/00", lambda record: record["versions"].update(cu_runner="0.1.0"))
    for command, main in (("cu-doctor", doctor.main), ("cu-report", report.main)):
        status, _, err = call_command(main, command, run_copy)
        assert status == 1
        assert re.fullmatch(
            rf"{command}: \S+: was made by cu_runner 0\.1\.0, whose runs this one \(0\.2\.0\) does "
            r"not read; move it away and make it again\n",
            err,
        )


@pytest.mark.parametrize("content", ["", "5", "[]", "null", "{"])
def test_metrics_that_are_none(examine, run_copy, content):
    (run_copy / "steps/01/metrics.json").write_text(content)
    status, lines, _ = examine(run_copy)
    assert status == 1
    assert any(
        line.startswith("WRONG       steps/01: metrics: cannot be computed") for line in lines
    )


def test_any_byte_of_the_configuration_may_be_damaged(examine, run_copy):
    path, numbers = run_copy / "config.yaml", random.Random(0)
    whole = path.read_bytes()
    for position in sorted(numbers.sample(range(len(whole)), 12)):
        path.write_bytes(
            whole[:position]
            + bytes([whole[position] ^ 1 << numbers.randrange(7)])
            + whole[position + 1 :]
        )
        if yaml_of(path) is None:
            continue
        status, lines, _ = examine(run_copy)
        assert status == 1
        assert "WRONG       config.yaml: does not match the sha256 in its first line" in lines


def yaml_of(path) -> dict | None:
    """What the file holds; None if that is no configuration, which has a line of its own."""
    try:
        return read_config(path.parent)[0]
    except StoreError:
        return None


def test_a_changed_configuration_is_found(examine, run_copy):
    path = run_copy / "config.yaml"
    path.write_text(path.read_text().replace("project: cu_runner", "project: cu_runnes"))
    assert examine(run_copy)[1] == [
        "WRONG       config.yaml: does not match the sha256 in its first line"
    ]
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    lines = examine(run_copy)[1]
    assert any("the name ends in" in line for line in lines)
    assert any("steps/00: chain: belongs to another configuration" in line for line in lines)


def test_what_is_no_run_gets_one_line(call_command, tmp_path):
    status, out, err = call_command(doctor.main, "cu-doctor", tmp_path)
    assert (status, out) == (1, "")
    assert err == (
        f"cu-doctor: {tmp_path}: holds no readable config.yaml; give a run directory or a "
        "packed run\n"
    )


# ------------------------------------------------------------------------------------------ packing
def test_a_packed_run_is_verified_and_is_a_run_again(
    call_command, examine, run_copy, tmp_path, in_process
):
    archive = tmp_path / "run.zip"
    status, out, err = call_command(report.main, "cu-report", run_copy, "--pack", archive)
    assert (status, err) == (0, "")
    assert out.startswith(f"packed: {archive}")
    assert examine(archive) == (0, [], "26 checks, all well")
    with zipfile.ZipFile(archive) as packed:
        names = {name.removeprefix(f"smoke/{run_copy.name}/") for name in packed.namelist()}
        packed.extractall(tmp_path / "elsewhere/outputs/runs")
    assert {
        "config.yaml",
        "metrics.csv",
        "summary.json",
        "manifest.json",
        "steps/02/delta.safetensors",
    } <= names
    assert not {"run.log", ".lock"} & names
    again = tmp_path / "elsewhere/outputs/runs/smoke" / run_copy.name
    (again / "manifest.json").unlink()
    assert examine(again)[0] == 0
    weights = [
        safetensors.torch.load_file(path / "steps/02/delta.safetensors")
        for path in (again, run_copy)
    ]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_a_damaged_archive_is_refused(call_command, run_copy, tmp_path):
    archive = tmp_path / "run.zip"
    call_command(report.main, "cu-report", run_copy, "--pack", archive)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    status, out, err = call_command(doctor.main, "cu-doctor", archive)
    assert (status, out) == (1, "")
    assert err.startswith(f"cu-doctor: {archive}: ")
    assert err.count("\n") == 1


def test_whatever_is_damaged_in_an_archive_it_is_refused(call_command, run_copy, tmp_path):
    archive, draw = tmp_path / "run.zip", random.Random(0)
    call_command(report.main, "cu-report", run_copy, "--pack", archive)
    whole, said = archive.read_bytes(), set()
    number = 150 if "CU_FUZZ" in os.environ else 50
    places = draw.sample(range(len(whole)), number)
    places += draw.sample(range(len(whole) - 3000, len(whole)), number)  # zip's own list of files
    for position in places:
        archive.write_bytes(
            whole[:position]
            + bytes([whole[position] ^ 1 << draw.randrange(8)])
            + whole[position + 1 :]
        )
        try:
            unpack(archive, tmp_path / "unpacked")
        except StoreError as error:  # else the bit was one that zip does not use
            said.add(str(error))
    assert len(said) > 5
    assert not any("\n" in line for line in said)


@pytest.mark.parametrize("root", ["/{}/victim", "a/../../victim", "../victim", "..", "a/./victim"])
def test_an_archive_writes_and_deletes_nothing_elsewhere(tmp_path, root):
    root, archive = root.format(tmp_path).replace("//", "/"), tmp_path / "evil.zip"
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/manifest.json").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for hashes in ({}, {"../new": hash_of(b"x")}):
        with zipfile.ZipFile(archive, "w") as made:
            made.writestr(f"{root}/manifest.json", json.dumps(hashes))
            made.writestr(f"{root}/../new", "x")
        with pytest.raises(StoreError, match="is no name of a packed file"):
            unpack(archive, tmp_path / "unpacked")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, archive])
    assert (tmp_path / "victim/manifest.json").read_text() == "mine"


@pytest.mark.parametrize("manifest", ["[]", "5", '{"a": 5}', "{", "null"])
def test_an_archive_with_another_manifest(tmp_path, manifest):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as made:
        made.writestr("smoke/run/manifest.json", manifest)
    with pytest.raises(StoreError, match="cannot be read as a packed run"):
        unpack(tmp_path / "odd.zip", tmp_path / "unpacked")


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_an_unfinished_or_damaged_run_is_not_packed(call_command, run_copy, tmp_path):
    archive = tmp_path / "run.zip"
    (run_copy / "steps/01/predictions.csv").write_text("")
    status, _, err = call_command(report.main, "cu-report", run_copy, "--pack", archive)
    assert status == 1
    assert "steps/01/predictions.csv: is missing or damaged" in err
    (run_copy / "steps/02/step.json").unlink()
    status, _, err = call_command(report.main, "cu-report", run_copy, "--pack", archive)
    assert status == 1
    assert "1 of 2 requests are done; finish the run before it is packed" in err
    assert not list(tmp_path.glob("*.zip*")) + list(tmp_path.glob(".*.tmp"))


# ------------------------------------------------------------------------------------------- a plan
PLAN = (
    "sequence=smoke",
    "wandb.mode=disabled",
    "num_threads=1",
    "train.batch_size=2",
    "model.sampler.steps=4",
)


@pytest.fixture
def check(call_command):
    """Returns check(*overrides) -> (exit status, findings as {what: (mark, detail)})."""

    def call(*overrides):
        given = {override.partition("=")[0] for override in overrides}
        plan = [each for each in PLAN if each.partition("=")[0] not in given]
        status, out, err = call_command(doctor.main, "cu-doctor", *plan, *overrides)
        assert err == ""
        said = out.splitlines()
        lines = [line.strip() for line in said if not line.startswith("note: ")]
        assert lines[0] == "plan"
        found = {}
        for line in lines[1:-1]:
            what, _, detail = line[11:].strip().partition(": ")
            found[what] = (line[:11].strip(), detail)
        return status, found

    return call


def test_a_plan_that_would_run_is_well(check, tmp_path):
    status, found = check()
    assert status == 0
    assert {mark for mark, _ in found.values()} == {"ok"}
    assert set(found) == {
        "device",
        "W&B",
        "model",
        "evaluator",
        "composition",
        "labels",
        "disk",
        "scheduler of anchors",
        "scheduler of eval",
        "base accuracy",
        "method",
        "training",
        "memory",
        "time",
    }
    assert " for 22 images at " in found["time"][1]
    assert " 120 training steps " in found["time"][1]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_with_everything_is_well(check, monkeypatch):
    seen = []
    step = Training.step

    def watched(training):
        scope = training._scope
        unet = scope.model.denoiser
        names = {"trained": next(iter(scope.params)), "frozen": "conv_in.weight"}
        kinds = [dict(unet.named_parameters())[name].dtype for name in names.values()]
        seen.append((scope.request.index, scope.steps, training.done))
        assert (unet.is_gradient_checkpointing, kinds) == (True, [torch.float32, torch.bfloat16])
        assert scope.model._caches_text
        assert type(training._method).__name__ == "SculpMem"
        assert list(training._regularizers) == ["l2", "nullspace"]
        step(training)

    monkeypatch.setattr(Training, "step", watched)
    status, found = check(
        "train.gradient_checkpointing=true",
        "model.precision=bf16",
        "method=sculpmem",
        "method.warmup=2",
        "reg=[l2,nullspace]",
        "retention=shapecanvas",
        "retention.num_prompts=5",
    )
    assert (status, {mark for mark, _ in found.values()}) == (0, {"ok"})
    # two steps of the first and the last request, of the 60 that they would have
    assert seen == [(1, 60, 0), (1, 60, 1), (2, 60, 0), (2, 60, 1)]
    assert {"retention", "reg.l2", "reg.nullspace"} <= set(found)
    assert (
        " for 37 images (15 of them of general prompts) " in found["time"][1]
    )  # 22 and 5 at each of 3 evaluations


def test_a_method_in_closed_form_makes_one_step_a_request(check):
    status, found = check("method=uce")
    assert status == 0
    assert " and 2 training steps " in found["time"][1]


COCO = (
    "retention=coco",
    "retention.prompts=general_captions",
    "retention.clip_score.path=/no/clip.safetensors",
    "retention.features.path=/no/inception.pth",
)


@pytest.mark.parametrize(
    ("overrides", "what", "said"),
    [
        (COCO, "retention", "/no/clip.safetensors: no such file or directory"),
        (
            ("anchors.scheduler=NoSuch",),
            "scheduler of anchors",
            "anchors.scheduler=NoSuch: diffusers has no such scheduler",
        ),
        (
            ("eval.scheduler=NoSuch",),
            "scheduler of eval",
            "eval.scheduler=NoSuch: diffusers has no such scheduler",
        ),
        (
            ("method=sculpmem", "method.warmup=5000"),
            "method",
            "method.warmup=5000: train.steps=60 leaves no step",
        ),
        (
            ("reg=nullspace", "reg.nullspace.file=/nope.txt"),
            "reg.nullspace",
            "reg.nullspace.file=/nope.txt: ",
        ),
        (
            ("method=uce", "reg=l2"),
            "composition",
            "reg=l2 acts on the loss, and the method sets the weights in closed form",
        ),
        (
            ("method=esd", "method.variant=esd-u", "reg=gradproj"),
            "composition",
            "reg=gradproj projects on what the texts of other prompts do not span, by weights",
        ),
        (
            ("reg=merge", "reg.merge.lam=[]"),
            "reg.merge",
            "reg.merge.lam has 0 entries; 2 requests need 1",
        ),
        (("train.lr=1e30",), "training", "training led to "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_run_would_die_of_is_found(check, overrides, what, said):
    status, found = check(*overrides)
    assert status == 1
    assert [name for name, (mark, _) in found.items() if mark == "WRONG"] == [what]
    assert found[what][1].startswith(said)


def test_memory_that_does_not_suffice(check, monkeypatch):
    monkeypatch.setattr(checkup, "free_memory", lambda device: 10_000_000)
    status, found = check()
    mark, detail = found["memory"]
    assert (status, mark) == (1, "WRONG")
    assert detail.endswith(
        "0.0 GB were free; a long run needs 1.1 times that; "
        "train.gradient_checkpointing=true and eval.batch_size=24 for less "
        "memory and the same results; model.precision=bf16 and train.batch_size=1 for less "
        "memory in another experiment"
    )


def test_running_out_of_gpu_memory_names_what_changes_no_result_first(check, monkeypatch):
    def step(training):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Training, "step", step)
    status, found = check("train.gradient_checkpointing=true")
    assert status == 1
    assert found["training"] == (
        "WRONG",
        "out of GPU memory; eval.batch_size=24 for less memory and the same results; "
        "model.precision=bf16 and train.batch_size=1 for less memory in another experiment",
    )
    assert found["time"][0] == "not checked"


def test_a_gpu_is_asked_for_what_is_free_and_not_for_what_it_has(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (3_000_000_000, 80_000_000_000))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 2_900_000_000)
    device, plan = torch.device("cuda"), compose(list(PLAN))
    assert checkup.free_memory(device) == 3_000_000_000
    assert not checkup.check_memory(plan, device, checkup.free_memory(device)).ok
    assert checkup.check_memory(plan, device, 3_200_000_000).ok


def test_every_part_that_is_missing_is_named_at_once(check, tmp_path):
    status, found = check(f"model.path={tmp_path}", f"evaluator.paths.style={tmp_path / 'nothing'}")
    assert status == 1
    assert found["model"] == (
        "WRONG",
        (
            f"{tmp_path}: no readable model_index.json; it must be a diffusers directory "
            "(save_pretrained)"
        ),
    )
    assert found["evaluator"][0] == "WRONG"
    assert found["images"] == (
        "not checked",
        "needs every part of the run, and its schedulers",
    )
    assert found["disk"][0] == "not checked"


def turned(names: list[str]) -> list[str]:
    return names[1:] + names[:1]


def targets_swapped(names: list[str]) -> list[str]:
    other = {"torch light": "snow drift", "snow drift": "torch light"}
    return [other.get(name, name) for name in names]


@pytest.mark.parametrize(
    ("change", "kept"),
    [(turned, "0% of what is retained"), (targets_swapped, "100% of what is retained")],
)
def test_labels_in_another_order_show_in_the_base_accuracy(check, tmp_path, change, kept):
    source = locate("package:shapecanvas/weights/style_classifier")
    shuffled = tmp_path / "style"
    shutil.copytree(source, shuffled)
    config = json.loads((shuffled / "config.json").read_text())
    names = list(config["id2label"].values())
    config["id2label"] = dict(zip(config["id2label"], change(names), strict=True))
    config["label2id"] = {name: int(index) for index, name in config["id2label"].items()}
    (shuffled / "config.json").write_text(json.dumps(config))
    status, found = check(f"evaluator.paths.style={shuffled}")
    assert status == 1
    mark, detail = found["base accuracy"]
    assert mark == "WRONG"
    assert f", 0% of the targets, {kept}, 100% of the objects are recognised" in detail
    assert detail.endswith(
        "under 50% nothing can be measured: the model does not know these names in these prompts, "
        "or the labels are in another order"
    )


def test_a_full_disk_and_a_missing_login_are_wrong(check, monkeypatch):
    monkeypatch.setattr(
        "cu_runner.runner.preflight.shutil.disk_usage", lambda path: SimpleNamespace(free=1000)
    )
    monkeypatch.setattr(
        "wandb.login", lambda **options: (_ for _ in ()).throw(RuntimeError("no key"))
    )
    status, found = check("wandb.mode=online")
    assert status == 1
    assert found["disk"][0] == "WRONG"
    assert found["W&B"] == ("WRONG", "no key; run `wandb login`, or use wandb.mode=offline")


def test_without_arguments_it_says_how_it_is_used(call_command):
    status, out, err = call_command(doctor.main, "cu-doctor")
    assert (status, out) == (2, "")
    assert err.startswith("usage: cu-doctor")
    assert "give a run, or overrides" in err


def test_a_bad_plan_is_one_line(call_command):
    status, out, err = call_command(doctor.main, "cu-doctor", "sequence=smoke", "train.lr=-1")
    assert (status, out) == (2, "")
    assert err == "cu-doctor: train.lr=-1: input should be greater than 0\n"
    status, _, err = call_command(doctor.main, "cu-doctor", "some/run", "seed=1")
    assert status == 2
    assert "give runs or overrides, not both" in err


def test_the_peak_of_gpu_memory_is_that_of_the_request(monkeypatch):
    calls = []
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", calls.append)
    monkeypatch.setattr("torch.cuda.init", lambda: None)

    def unlearn(*_):
        calls.append("unlearn")
        raise InterruptedError

    for device in ("cuda:1", "cpu"):
        weights = TrainedWeights({}, {}, torch.device(device))
        store = SimpleNamespace(step_dir=lambda index: Path())
        runner = SimpleNamespace(
            device=torch.device(device),
            weights=weights,
            store=store,
            _scope=lambda request: None,
            _unlearn=unlearn,
        )
        with pytest.raises(InterruptedError):
            Runner._serve(runner, SimpleNamespace(start="base"), [SimpleNamespace(index=0)])
    assert calls == [torch.device("cuda:1"), "unlearn", "unlearn"]


def test_what_judges_the_retention_is_checked(examine, in_process, tmp_path):
    status, out, _ = in_process(*SMOKE, "retention=shapecanvas", "retention.num_prompts=4")
    assert status == 0
    run = run_directory(out, tmp_path)
    status, lines, _ = examine(run, "--all")
    assert (status, "ok          weights of the retention" in lines) == (0, True)
    for step in ("00", "01", "02"):
        rewrite(run / "steps" / step, lambda record: record.update(retention_sha256="0" * 64))
    status, lines, _ = examine(run)
    said = "WRONG       weights of the retention: are not those that the run began with"
    assert (status, said in lines) == (1, True)
    rewrite(run / "steps/02", lambda record: record.update(retention_sha256="1" * 64))
    assert any("retention_sha256 is not that of step 0" in line for line in examine(run)[1])
