"""Checkpoints of other tools: what each form is read as, what is refused, and which run it is."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch
import yaml
from conftest import SMOKE

from cu_runner.cli import doctor, evaluate, table
from cu_runner.config.compose import compose
from cu_runner.methods.imported import Imported
from cu_runner.models.gates import add_gates
from cu_runner.models.loading import load_model
from cu_runner.models.low_rank import low_rank
from cu_runner.models.original_layout import original_weights
from cu_runner.models.parameters import select_parameters
from cu_runner.models.pipeline import make_pipeline
from cu_runner.models.unlearned import hash_checkpoint, locate_weights, read_unlearned
from cu_runner.schema.errors import ConfigError, ModelError, WeightFileError
from cu_runner.schema.settings import Sampler
from cu_runner.store.run_record import read_run

OWN = [word for word in SMOKE if not word.startswith(("method.", "train."))]


def load(path: Path):
    return load_model(str(path), 64, Sampler(2, 2.5))


@pytest.fixture(scope="module")
def base(pipelines):
    return load(pipelines["sd15"])


@pytest.fixture(scope="module")
def change(base):
    """A change of rank 1 of keys and values."""
    rng = torch.Generator().manual_seed(0)
    found = {}
    for name, weight in select_parameters(base.denoiser, "kv_xattn").items():
        out, width = weight.shape
        found[name] = (
            0.01 * torch.randn(out, 1, generator=rng) @ torch.randn(1, width, generator=rng)
        )
    return found


@pytest.fixture(scope="module")
def changed(pipelines, change):
    """The model with the change."""
    model = load(pipelines["sd15"])
    with torch.no_grad():
        for name, weight in model.denoiser.named_parameters():
            if name in change:
                weight += change[name]
    return model


@pytest.fixture(scope="module")
def checkpoints(base, change, changed, tmp_path_factory):
    """The changed model in every form, by its name."""
    root = tmp_path_factory.mktemp("checkpoints")
    make_pipeline(changed).save_pretrained(root / "directory")
    own = dict(changed.denoiser.named_parameters())
    kept = {name: weight.detach().contiguous() for name, weight in own.items()}
    (root / "lora").mkdir()
    files = {
        "single.safetensors": original_weights(changed.components),
        "delta.safetensors": change,
        "some.safetensors": {name: kept[name] for name in change},
        "unet.safetensors": {f"unet.{name}": weight for name, weight in kept.items()},
        "lora/any_name.safetensors": low_rank(change, own).state_dict(),
    }
    for name, weights in files.items():
        whole = {key: each.clone().contiguous() for key, each in weights.items()}
        safetensors.torch.save_file(whole, root / name)
    make_pipeline(changed).to(torch.float16).save_pretrained(root / "half")
    return root


FORMS = {
    "directory": "diffusers directory",
    "single.safetensors": "single file",
    "delta.safetensors": "changes of the UNet",
    "some.safetensors": "weights of the UNet",
    "unet.safetensors": "weights of the UNet",
    "lora": "LoRA",
}


# ---------------------------------------------------------------------------------------- the forms
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_as_the_change(checkpoints, base, change, name):
    found = read_unlearned(str(checkpoints / name), base, None, ())
    assert found.form == FORMS[name]
    moved = {key: each for key, each in found.change.items() if each.any()}
    assert moved.keys() == change.keys()
    for key, each in moved.items():
        torch.testing.assert_close(each, change[key], atol=1e-6, rtol=0)
    params = Imported(str(checkpoints / name)).weights(base)
    assert list(params) == [key for key, _ in base.denoiser.named_parameters() if key in change]


def test_a_checkpoint_in_half_precision_is_measured_as_it_is(checkpoints, base, change, pipelines):
    """Its other parts are the base model's up to rounding; its UNet is what it is."""
    found = read_unlearned(str(checkpoints / "half"), load(pipelines["sd15"]), None, ())
    name = next(iter(change))
    weight = dict(base.denoiser.named_parameters())[name].detach()
    expected = (weight + change[name]).half().float() - weight
    torch.testing.assert_close(found.change[name], expected, atol=1e-7, rtol=0)


def test_gates_are_taken_as_gates(pipelines, tmp_path):
    model = load(pipelines["sd15"])
    weights = add_gates(model.denoiser, 2)
    drawn = {name: torch.randn(each.shape) for name, each in weights.items()}
    safetensors.torch.save_file(drawn, tmp_path / "delta.safetensors")
    other = load(pipelines["sd15"])
    method = Imported(str(tmp_path))
    assert method.weights(other).keys() == drawn.keys()
    assert read_unlearned(str(tmp_path), other, None, ()).form == "gates"


def test_what_a_file_holds_can_be_said(checkpoints, base, change):
    place = str(checkpoints / "delta.safetensors")
    name = next(iter(change))
    weight = dict(base.denoiser.named_parameters())[name].detach()
    found = read_unlearned(place, base, "weights", ())
    torch.testing.assert_close(found.change[name], change[name] - weight)


# -------------------------------------------------------------------------------------- what is not
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_change_of_another_part_is_refused(checkpoints, base, part, tmp_path):
    """In a directory and in a single file."""
    place = shutil.copytree(checkpoints / "directory", tmp_path / "directory")
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    file = place / part / f"{stem}.safetensors"
    weights = safetensors.torch.load_file(file)
    name = next(key for key in weights if key.endswith("weight"))
    weights[name].flatten()[0] += 0.1
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"its {part} is not that of the base model"):
        read_unlearned(str(place), base, None, ())
    single = safetensors.torch.load_file(checkpoints / "single.safetensors")
    prefix = {"vae": "first_stage_model.", "text_encoder": "cond_stage_model."}[part]
    own = next(key for key in single if key.startswith(prefix) and key.endswith("weight"))
    single[own].flatten()[0] += 0.1
    safetensors.torch.save_file(single, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=f"its {part} is not that of the base model"):
        read_unlearned(str(tmp_path / "x.safetensors"), base, None, ())


def test_another_model_is_refused(checkpoints, pipelines, base, tmp_path):
    with pytest.raises(ModelError, match="its vae is not that of the base model"):
        read_unlearned(str(pipelines["sd21_base"]), base, None, ())
    other = load(pipelines["sd21_base"])
    for name, said in (
        ("single.safetensors", "vae|text_encoder|shape"),
        ("delta.safetensors", "shape"),
    ):
        with pytest.raises(ModelError, match=said):
            read_unlearned(str(checkpoints / name), other, None, ())
    safetensors.torch.save_file({"some.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"some\.weight is no weight of the base model's UNet"):
        read_unlearned(str(tmp_path / "x.safetensors"), base, None, ())
    with pytest.raises(ModelError, match="its UNet is that of the base model"):
        Imported(str(pipelines["sd15"])).weights(base)


def test_places_that_hold_no_checkpoint(tmp_path, run_copy):
    with pytest.raises(ModelError, match="no such file or directory; give a diffusers directory"):
        locate_weights(str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"0 files of weights \(.safetensors\), not one"):
        locate_weights(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="is a run directory; `cu-eval"):
        locate_weights(str(run_copy))
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(WeightFileError, match="pickle"):
        read_unlearned(str(tmp_path / "x.pt"), None, None, ())


# ---------------------------------------------------------------------------------------- which run
def test_the_run_is_named_by_the_content_of_the_checkpoint(checkpoints, tmp_path):
    def plan_of(place: Path, *more: str):
        return compose([*OWN, "method=imported", f"method.checkpoint={place}", *more])

    file = checkpoints / "delta.safetensors"
    first = plan_of(file)
    assert first.resolved["method"]["sha256"] == hash_checkpoint(str(file))
    assert first.resolved["setting"]["plan"] == "simultaneous"
    assert first.resolved["setting"]["last_only"] is True
    moved = Path(shutil.copy(file, tmp_path / "elsewhere.safetensors"))
    assert plan_of(moved).signature == first.signature
    # where it is gone, its sha256 is enough to name the run
    gone = plan_of(tmp_path / "gone", f"method.sha256={hash_checkpoint(str(file))}")
    assert gone.signature == first.signature
    other = plan_of(checkpoints / "some.safetensors")
    assert other.signature != first.signature
    directory = shutil.copytree(checkpoints / "directory", tmp_path / "directory")
    before = plan_of(directory).signature
    (directory / "README.md").write_text("another card")
    assert plan_of(directory).signature == before
    (directory / "unet/config.json").write_text("{}")
    assert plan_of(directory).signature != before
    with pytest.raises(ConfigError, match="with method=imported nothing is trained; leave reg out"):
        plan_of(file, "reg=l2")


def test_a_checkpoint_is_measured_as_one_row(run_copy, call_command, tmp_path):
    """cu-eval --model, and cu-doctor, cu-table and the same command after it, without the file."""
    shutil.copy(run_copy / "steps/02/delta.safetensors", tmp_path / "theirs.safetensors")
    words = ["--model", "theirs.safetensors", *OWN]
    status, out, err = call_command(evaluate.main, "cu-eval", *words)
    assert status == 0, err
    directory = tmp_path / out.strip().splitlines()[-1].removeprefix("evaluation: ")
    run, own = read_run(directory), read_run(run_copy)
    assert directory.parent == run_copy.parent
    assert run.command == f"cu-eval --model=theirs.safetensors {' '.join(OWN[:2])}"
    assert run.unlearned(1) == ["torch light", "snow drift"]
    assert run.records[0].model_sha256 == own.records[0].model_sha256
    # all was unlearned by the run's last request: the same images, and the same drift
    for name in ("UA", "RA_I", "RA_C", "drift_l2"):
        assert run.table[name].iloc[1] == pytest.approx(own.table[name].iloc[2])
    theirs, ours = run.predictions(1), own.predictions(2)
    columns = ["prompt", "seed", "predicted_style", "predicted_object"]
    pd.testing.assert_frame_equal(theirs[columns], ours[columns])
    assert run.records[1].training.method["form"] == "changes of the UNet"
    content = {
        "title": "mine",
        "metrics": ["UA"],
        "rows": {"theirs": ["method=imported", "method.checkpoint=theirs.safetensors"]},
        "experiments": {
            "smoke": {"model": "x", "methods": {"m": []}, "columns": {"style": list(OWN)}}
        },
    }
    digest = run.config["method"]["sha256"]
    (tmp_path / "theirs.safetensors").rename(tmp_path / "gone.safetensors")
    content["rows"]["theirs"].append(f"method.sha256={digest}")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    status, out, err = call_command(table.main, "cu-table", "mine.yaml")
    assert status == 0, err
    assert f"| theirs | {run.table['UA'].iloc[1]:.1f}" in out
    assert call_command(doctor.main, "cu-doctor", directory)[0] == 0
    again = ["--model", "theirs.safetensors", f"method.sha256={digest}", *OWN]
    status, out, err = call_command(evaluate.main, "cu-eval", *again)
    assert status == 0, err
    assert "complete already" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "gone", "sequence=smoke"], "gone: no such file or directory"),
        (["--model", "gone", "method=esd"], "method=esd: --model measures a checkpoint"),
        (["--model", "gone", "some_run"], "some_run: --model stands in place of a run"),
        ([], "give a run directory, or --model PLACE"),
    ],
)
def test_bad_input_is_one_line(call_command, tmp_path, words, said):
    status, _, err = call_command(evaluate.main, "cu-eval", *words)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "outputs").exists()
