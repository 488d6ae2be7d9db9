"""Runs of SD3 and FLUX in miniature by the commands: begun, killed, gone on with, exported, read
back.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from commands import Forked, environment, run_forked
from conftest import run_directory

from cu_runner.api.model import kind_of
from cu_runner.cli import doctor, evaluate, export, report
from cu_runner.models.architectures import folder_of, pack
from cu_runner.models.loading import load_model
from cu_runner.models.low_rank import low_rank
from cu_runner.models.parameters import select_parameters
from cu_runner.models.sampling import generate
from cu_runner.models.unlearned import read_unlearned
from cu_runner.runner.finished import load_step
from cu_runner.runtime.seeding import image_noise
from cu_runner.schema.errors import ModelError, WeightFileError
from cu_runner.schema.settings import Sampler
from cu_runner.store.run_record import read_run

KINDS = ("sd3_medium", "flux_dev")
PROMPTS, SEEDS = ["a tree in snow drift style", "a bird in torch light style"], [3, 4]
# of images in 0..1: the layers add B (A x) to W x, we read (W + B A) x
LORA_TOLERANCE = 1e-4
FORMS = ("diffusers", "lora", "delta")


def words(kind: str, directory: Path) -> list[str]:
    return [
        f"model={kind}",
        f"model.path={directory}",
        "model.resolution=64",
        "model.precision=fp32",
        "model.vae_slicing=false",  # as the plain pipeline decodes, to the last bit
        "model.sampler.steps=2",
        "sequence=smoke",
        "num_threads=1",
        "wandb.mode=disabled",
    ]


def trained(kind: str, directory: Path) -> list[str]:
    few = ["train.steps=6", "train.batch_size=2", "train.lr=1e-3", "method.num_anchors=2"]
    return [*words(kind, directory), "method=conabl", *few]


@pytest.fixture(scope="module")
def runs(transformers_on_disk, shared):
    """A finished run of each kind: where it was made, and its directory."""

    def make(folder: Path) -> dict[str, str]:
        found = {}
        for kind in KINDS:
            place = folder / kind
            place.mkdir()
            chosen = trained(kind, transformers_on_disk[kind])
            done = run_forked("cu-run", *chosen, cwd=place, env=environment())
            assert done.returncode == 0, done.stderr
            found[kind] = str(run_directory(done.stdout, place))
        return found

    made, folder = shared("transformer_runs", make)
    return {kind: (folder / kind, Path(made[kind])) for kind in KINDS}


def delta_of(directory: Path, step: int = 2) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(directory / f"steps/{step:02d}/delta.safetensors")


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    """The last step of each run in every form that it has: its folder and what was printed."""
    root, found = tmp_path_factory.mktemp("exports"), {}
    for kind in KINDS:
        for form in FORMS:
            place = root / kind / form
            place.parent.mkdir(exist_ok=True)
            chosen = [str(runs[kind][1]), str(place), "--to", form]
            done = run_forked("cu-export", *chosen, cwd=root, env=environment())
            assert done.returncode == 0, done.stderr
            found[kind, form] = place
    return found


# ------------------------------------------------------------------------------------------ the run
@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_of_the_text_are_trained(runs, transformers_on_disk, kind):
    directory = runs[kind][1]
    model = load_model(str(transformers_on_disk[kind]), 64, Sampler(2, 1.0))
    params = select_parameters(model.denoiser, "kv_xattn")
    change = delta_of(directory)
    assert {name: each.shape for name, each in change.items()} == {
        name: each.shape for name, each in params.items()
    }
    assert all(each.abs().max() > 0 for each in change.values())
    assert len(read_run(directory).records) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_planned_and_checked(runs, transformers_on_disk, in_process, call_command, kind):
    chosen = trained(kind, transformers_on_disk[kind])
    status, out, err = in_process(*chosen, "dry_run=true")
    assert (status, err) == (0, "")
    assert "to do: 3 of 3 evaluations, 12 training steps of batch 2, 22 images" in out
    # three copies of keys and values: the step's weights, and the checkpoint's
    size = sum(4 * each.numel() for each in delta_of(runs[kind][1]).values())
    assert size < 1e6 * float(re.search(r"disk: ([\d.]+) MB of weights", out)[1]) < 20 * size
    status, out, err = call_command(doctor.main, "cu-doctor", runs[kind][1])
    assert status == 0, out + err
    assert "checks, all well" in out
    _, out, _ = call_command(doctor.main, "cu-doctor", *chosen)
    wrong = [line.split()[1:3] for line in out.splitlines() if "WRONG" in line]
    assert wrong == [["base", "accuracy:"]], out  # its weights are random


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_ends_with_the_same_bits(runs, transformers_on_disk, tmp_path, kind):
    """After the first request, somewhere in the second."""
    chosen = trained(kind, transformers_on_disk[kind])
    process = Forked("cu-run", *chosen, cwd=tmp_path)
    cwd, whole = runs[kind]
    own = tmp_path / whole.relative_to(cwd)
    deadline = time.monotonic() + 120
    while not (own / "steps/01/step.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert (own / "steps/01/step.json").exists()
    assert not (own / "steps/02/step.json").exists()
    done = run_forked("cu-run", *chosen, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    for step in (1, 2):
        left, right = delta_of(own, step), delta_of(whole, step)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
        read = [each / f"steps/{step:02d}/predictions.csv" for each in (own, whole)]
        assert read[0].read_bytes() == read[1].read_bytes()


def test_a_report_has_the_layers_in_their_order(runs, outlined, call_command, tmp_path):
    shutil.copytree(runs["flux_dev"][0] / "outputs", tmp_path / "outputs")
    status, out, err = call_command(report.main, "cu-report", "outputs/runs")
    assert status == 0, out + err


@pytest.mark.parametrize("kind", ["sd3_medium", "flux_dev", "pixart_sigma", "sana", "sdxl"])
def test_a_prompt_is_encoded_alike_alone_and_among_others(transformers_on_disk, pipelines, kind):
    """Else a run that is resumed, which encodes other prompts together, ends with other bits."""
    model = load_model(str((transformers_on_disk | pipelines)[kind]), 64, Sampler(2, 1.0))
    prompts = [f"a {name}" for name in ("tree", "star", "bird", "ball", "box", "tent", "lamp")]
    with torch.no_grad():
        whole = model.prompts._encode(prompts)
        for count in (1, 2, 3, 5):
            part = model.prompts._encode(prompts[:count])
            assert torch.equal(part.hidden, whole.hidden[:count])
            if whole.pooled is not None:
                assert torch.equal(part.pooled, whole.pooled[:count])


# ------------------------------------------------------------------------------------------- export
def code_of(place: Path, base: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
    return re.sub(r"^BASE = .*$", f"BASE = {str(base)!r}", code, flags=re.MULTILINE)


def drawn_by(pipeline: diffusers.DiffusionPipeline, kind: str) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = image_noise(PROMPTS, SEEDS, (16, 8, 8))
    size = {"height": 64, "width": 64, "output_type": "pt"}
    latents = (pack(noise) if kind == "flux_dev" else noise).split(1)
    rows = [
        pipeline(prompt, latents=own, num_inference_steps=2, guidance_scale=3.5, **size).images
        for prompt, own in zip(PROMPTS, latents, strict=True)
    ]
    return torch.cat(rows)


def our_images(model) -> torch.Tensor:
    sampler = Sampler(2, 3.5)
    return torch.cat(list(generate(model, PROMPTS, SEEDS, sampler, batch_size=1, label="")))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_pipeline_makes_our_images(
    runs, exports, transformers_on_disk, monkeypatch, kind, form
):
    """By the code of its own card; a LoRA those of the weights that it holds."""
    place, run = exports[kind, form], read_run(runs[kind][1])
    monkeypatch.chdir(place)
    found: dict[str, object] = {}
    if form == "lora":
        pytest.importorskip("peft")
    exec(code_of(place, transformers_on_disk[kind]), found)
    theirs = drawn_by(found["pipeline"], kind)
    ours, untouched = our_images(load_step(run, 2)), our_images(load_step(run, 0))
    assert (ours - untouched).abs().max() > 10 * LORA_TOLERANCE
    if form != "lora":
        assert torch.equal(theirs, ours)
        return
    held = load_model(str(transformers_on_disk[kind]), 64, Sampler(2, 3.5))
    weights = safetensors.torch.load_file(place / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.") for name in weights)
    with torch.no_grad():
        for name in delta_of(runs[kind][1]):
            module = f"transformer.{name.removesuffix('.weight')}"
            up, down = (weights[f"{module}.lora_{side}.weight"] for side in "BA")
            held.denoiser.get_parameter(name).add_(up @ down)
    assert (theirs - our_images(held)).abs().max() < LORA_TOLERANCE


def test_what_no_form_holds_is_one_line(runs, transformers_on_disk, call_command, tmp_path):
    directory = runs["flux_dev"][1]
    status, _, err = call_command(export.main, "cu-export", directory, "out", "--to", "single-file")
    (line,) = (each for each in err.splitlines() if each.startswith("cu-export: "))
    assert status
    assert "--to single-file: the original layouts of models with a transformer" in line
    assert "use --to diffusers" in line
    assert not (tmp_path / "out").exists()


def test_a_kind_whose_pipeline_reads_no_lora(transformers_on_disk, tmp_path):
    model = load_model(str(transformers_on_disk["pixart_sigma"]), 64, Sampler(2, 1.0))
    file = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"transformer.a.lora_A.weight": torch.ones(1, 2)}, file)
    with pytest.raises(WeightFileError, match="diffusers reads no LoRA of PixArtTransformer2DM"):
        read_unlearned(str(file), model, None, ())


def test_the_part_of_a_pipeline_is_told_by_its_weights(transformers_on_disk, pipelines):
    for kind, directory in (transformers_on_disk | pipelines).items():
        model = load_model(str(directory), 64, Sampler(2, 1.0))
        names = [name for name, _ in model.denoiser.named_parameters()]
        part = "unet" if kind in pipelines else "transformer"
        assert {folder_of([name]) for name in names} == {part}


# ------------------------------------------------------------------------------- what is read back
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_read_as_the_change(runs, exports, transformers_on_disk, kind, form):
    base = load_model(str(transformers_on_disk[kind]), 64, Sampler(2, 1.0))
    change = delta_of(runs[kind][1])
    found = read_unlearned(str(exports[kind, form]), base, None, ())
    said = {"diffusers": "diffusers directory", "lora": "LoRA"}
    assert found.form == said.get(form, "changes of the transformer")
    moved = {name: each for name, each in found.change.items() if each.any()}
    assert moved.keys() == change.keys()
    # a LoRA leaves out a thousandth of the squared norm
    whole = sum(each.square().sum() for each in change.values()) ** 0.5
    rest = sum((moved[name] - each).square().sum() for name, each in change.items()) ** 0.5
    assert rest / whole < (0.04 if form == "lora" else 1e-4)


def test_cu_eval_measures_a_directory(runs, exports, transformers_on_disk, call_command):
    place = exports["sd3_medium", "diffusers"]
    chosen = words("sd3_medium", transformers_on_disk["sd3_medium"])
    status, out, err = call_command(evaluate.main, "cu-eval", "--model", place, *chosen)
    assert status == 0, err
    last = out.strip().splitlines()[-1]
    run = read_run(Path(last.removeprefix("evaluation: ")))
    assert run.records[1].training.method["form"] == "diffusers directory"
    drift = read_run(runs["sd3_medium"][1]).records[2].row.drift_l2
    assert run.records[1].row.drift_l2 == pytest.approx(drift, rel=1e-4)


def test_alphas_of_a_lora(transformers_on_disk, tmp_path):
    """FLUX's are read as diffusers does; with Stable Diffusion 3 it ignores them, and so we refuse
    them.
    """
    rng = torch.Generator().manual_seed(0)
    for kind in KINDS:
        base = load_model(str(transformers_on_disk[kind]), 64, Sampler(2, 1.0))
        name = next(iter(select_parameters(base.denoiser, "kv_xattn")))
        change = {name: torch.randn(base.denoiser.get_parameter(name).shape, generator=rng)}
        own = dict(base.denoiser.named_parameters())
        weights = low_rank(change, own, rank=2).state_dict("transformer")
        file = tmp_path / f"{kind}.safetensors"
        safetensors.torch.save_file(weights, file)
        plain = read_unlearned(str(file), base, None, ()).change[name]
        module = f"transformer.{name.removesuffix('.weight')}"
        safetensors.torch.save_file(weights | {f"{module}.alpha": torch.tensor(1.0)}, file)
        if kind == "flux_dev":
            half = read_unlearned(str(file), base, None, ()).change[name]
            torch.testing.assert_close(2 * half, plain)
        else:
            with pytest.raises(WeightFileError, match="alpha is no part of a LoRA"):
                read_unlearned(str(file), base, None, ())


def test_what_does_not_belong_to_the_base_model_is_one_line(transformers_on_disk, tmp_path):
    base = load_model(str(transformers_on_disk["sd3_medium"]), 64, Sampler(2, 1.0))
    file = tmp_path / "original.safetensors"
    safetensors.torch.save_file({"model.diffusion_model.x": torch.ones(1)}, file)
    with pytest.raises(ModelError, match="an original layout, which is not known of a SD3Tr"):
        read_unlearned(str(file), base, None, ())
    safetensors.torch.save_file({"some.weight": torch.ones(1)}, file)
    with pytest.raises(ModelError, match="is no weight of the base model's transformer"):
        read_unlearned(str(file), base, None, ())
    copy = Path(shutil.copytree(transformers_on_disk["sd3_medium"], tmp_path / "copy"))
    (encoder,) = (copy / "text_encoder_3").glob("*.safetensors")
    weights = safetensors.torch.load_file(encoder)
    name = next(name for name in weights if name.endswith("q.weight"))
    weights[name] += 1
    safetensors.torch.save_file(weights, encoder, {"format": "pt"})
    with pytest.raises(ModelError, match=r"text_encoder_3 is not that of the base .* transformer"):
        read_unlearned(str(copy), base, None, ())


def test_the_preset_of_a_directory(transformers_on_disk, tmp_path):
    for kind, directory in transformers_on_disk.items():
        side = None if kind.startswith("flux") else 64  # whose configuration names none
        assert kind_of(str(directory)) == (kind, side)
    copy = Path(shutil.copytree(transformers_on_disk["sana"], tmp_path / "copy"))
    config = copy / "transformer/config.json"
    content = json.loads(config.read_text()) | {"_class_name": "LTXVideoTransformer3DModel"}
    config.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"of a class that is not known \(LTXVideo"):
        kind_of(os.fspath(copy))
