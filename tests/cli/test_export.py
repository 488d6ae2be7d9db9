"""cu-export: every form is loaded as its card says, in a process without cu_runner, and makes our
images; nothing unproven, half-written or of somebody else's is exported or replaced.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import yaml
from commands import environment
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from cu_runner.cli import evaluate, export
from cu_runner.models.checkpoint_files import locate
from cu_runner.models.gates import add_gates
from cu_runner.models.loading import load_model
from cu_runner.models.sampling import generate
from cu_runner.reporting.intervals import over_images
from cu_runner.reporting.model_card import model_card
from cu_runner.runner import hub
from cu_runner.runner.export import Exported
from cu_runner.runner.finished import load_step, set_change
from cu_runner.runtime.seeding import image_noise
from cu_runner.schema.settings import Sampler
from cu_runner.store.files import sha256_of
from cu_runner.store.run_record import read_run

BASE = "package:shapecanvas/weights/pipeline"
SAMPLER = Sampler(2, 2.5)
PROMPTS, SEEDS = ["a tree in snow drift style", "a bird in torch light style"], [3, 4]
FORMS = ("diffusers", "single-file", "lora", "delta")
# peft is no dependency: diffusers needs it to load a LoRA
LOADED = [form for form in FORMS if form != "lora" or importlib.util.find_spec("peft")]
# of images in 0..1: the layers add B (A x) to W x, we read (W + B A) x
LORA_TOLERANCE = 1e-4
# Loads every export by the code in its card, and draws with it.
PLAIN = """
import json, os, sys
import safetensors.torch, torch
from diffusers.utils import logging
logging.set_verbosity_error()
torch.set_num_threads(1)
places, noise, prompts = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
latents, images = safetensors.torch.load_file(noise)["noise"], {}
for place, code in places.items():
    os.chdir(place)
    found = {}
    exec(code, found)
    pipeline = found["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    images[place] = pipeline(
        prompts, latents=latents, num_inference_steps=2, guidance_scale=2.5, height=64, width=64,
        output_type="pt",
    ).images
assert not any(name.partition(".")[0] == "cu_runner" for name in sys.modules)
safetensors.torch.save_file(images, noise)
"""


def code_of(card: str) -> str:
    """The code of a card, with the base model where it lies here."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return re.sub(r"^BASE = .*$", f"BASE = {str(locate(BASE))!r}", code, flags=re.MULTILINE)


def our_images(model) -> torch.Tensor:
    return next(generate(model, PROMPTS, SEEDS, SAMPLER, batch_size=2, label=""))


@pytest.fixture
def cu_export(call_command):
    """Returns run(*arguments) -> (exit status, stdout, stderr) of cu-export in tmp_path."""
    return lambda *arguments: call_command(export.main, "cu-export", *arguments)


@pytest.fixture(scope="module")
def exports(finished_run, tmp_path_factory):
    """The finished smoke run in every form, each by the command: the folder, what it printed."""
    folder, said = tmp_path_factory.mktemp("exports"), {}
    for form in FORMS:
        with pytest.MonkeyPatch.context() as patch:
            lines = []
            patch.setattr(export, "say", lines.append)
            words = ["cu-export", str(finished_run[1]), str(folder / form), "--to", form]
            patch.setattr(sys, "argv", words)
            export.main()
        said[form] = "\n".join(lines)
    return folder, said


@pytest.fixture(scope="module")
def gated(finished_run, tmp_path_factory):
    """A delta with gates, its card, and the model that has them."""
    folder = tmp_path_factory.mktemp("gated")
    model = load_model(BASE, 64, SAMPLER)
    # the gate hears the difference of two prompts: it opens for one and not for the other
    one, other = model.encode_prompts(PROMPTS).hidden.mean(dim=1)
    weights = add_gates(model.denoiser, 1)
    rng = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        direction = (one - other) / (one - other).square().sum() * 2
        new = direction[None] if name.endswith("directions") else None
        weight.data = torch.randn(weight.shape, generator=rng) if new is None else new.contiguous()
    safetensors.torch.save_file(weights, folder / "delta.safetensors")
    run = read_run(finished_run[1])
    card = model_card(run, 2, Exported("delta", "delta.safetensors", gates=True), folder)
    return folder, card, model


@pytest.fixture(scope="module")
def plain_images(exports, gated, tmp_path_factory):
    """Images by a process that does not import cu_runner, by the place of the export."""
    folder, _ = exports
    places = {str(folder / form): code_of(card_of(folder / form)) for form in LOADED}
    places[str(gated[0])] = code_of(gated[1])
    noise = tmp_path_factory.mktemp("noise") / "noise.safetensors"
    model = load_model(BASE, 64, SAMPLER)
    safetensors.torch.save_file({"noise": image_noise(PROMPTS, SEEDS, model.latent_shape)}, noise)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(places), str(noise), json.dumps(PROMPTS)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return safetensors.torch.load_file(noise)


def card_of(directory: Path) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def drawn(finished_run):
    """Our own images of the run's last step, and those of its untouched model."""
    run = read_run(finished_run[1])
    return our_images(load_step(run, 2)), our_images(load_step(run, 0))


# ------------------------------------------------------------------------------------- what is made
@pytest.mark.parametrize("form", LOADED)
def test_a_plain_pipeline_makes_our_images(exports, plain_images, drawn, form):
    ours, untouched = drawn
    theirs = plain_images[str(exports[0] / form)]
    assert (ours - untouched).abs().max() > 100 * LORA_TOLERANCE
    if form != "lora":
        assert torch.equal(theirs, ours)
        return
    # the rank leaves out a thousandth of the squared norm; what it holds is what is drawn
    held = load_model(BASE, 64, SAMPLER)
    weights = safetensors.torch.load_file(exports[0] / "lora/pytorch_lora_weights.safetensors")
    with torch.no_grad():
        for name, weight in held.denoiser.named_parameters():
            module = f"unet.{name.removesuffix('.weight')}"
            if f"{module}.lora_A.weight" in weights:
                up, down = (weights[f"{module}.lora_{side}.weight"] for side in "BA")
                weight += up @ down
    assert (theirs - our_images(held)).abs().max() < LORA_TOLERANCE
    assert (theirs - ours).abs().mean() < 0.1 * (untouched - ours).abs().mean()


def test_gates_are_put_into_a_plain_pipeline(gated, plain_images, drawn):
    ours, (_, untouched) = our_images(gated[2]), drawn
    assert (plain_images[str(gated[0])] - ours).abs().max() < LORA_TOLERANCE
    assert (untouched[0] - ours[0]).abs().max() > 0.05
    assert "gates before keys and values" in gated[1]


def test_the_card_says_what_it_is(exports, finished_run):
    run = read_run(finished_run[1])
    for form in FORMS:
        card = card_of(exports[0] / form)
        head = yaml.safe_load(card.split("---\n")[1])
        assert head["license"] == "mit"
        assert "base_model" not in head  # it lies on no hub
        assert "Unlearned (2), in their order: torch light, snow drift." in card
        assert run.command in card
        for digest in (run.records[0].model_sha256, run.records[2].sha256):
            assert f"`{digest}`" in card
        listed = dict(re.findall(r"\| `([^`]+)` \| `([0-9a-f]{64})` \|", card))
        files = {
            path.relative_to(exports[0] / form).as_posix(): sha256_of(path)
            for path in (exports[0] / form).rglob("*")
            if path.is_file() and path.name != "README.md"
        }
        assert listed == files
        metrics = run.records[2].row.metrics
        low, high = over_images(metrics["RA_C"], 8)
        shown = f"{metrics['RA_C']:.1f} | {low:.1f} to {high:.1f} | 8 |"
        assert shown in card
        assert "Whether it can be had back was not measured" in card


def test_a_lora_says_its_rank(exports, finished_run):
    _, said = exports
    rank = int(re.search(r"rank (\d+), 22 matrices; it keeps 99\.9", said["lora"])[1])
    change = safetensors.torch.load_file(finished_run[1] / "steps/02/delta.safetensors")
    squares = torch.zeros(max(min(each.shape) for each in change.values()), dtype=torch.float64)
    for each in change.values():
        values = torch.linalg.svdvals(each.double()).square()
        squares[: len(values)] += values
    kept = squares.cumsum(0) / squares.sum()
    assert kept[rank - 2] < 0.999 <= kept[rank - 1]


def test_an_earlier_step_and_an_evaluation_with_recovery(run_copy, cu_export, call_command):
    status, out, err = call_command(evaluate.main, "cu-eval", run_copy, "recovery=precision")
    assert status == 0, err
    evaluation = out.strip().splitlines()[-1].removeprefix("evaluation: ")
    assert cu_export(evaluation, "two", "--to", "delta")[0] == 0
    card, record = card_of(Path("two")), read_run(Path(evaluation)).records[2]
    assert f"{record.row.metrics['recovered_precision']:.1f}" in card
    assert "under precision" in card
    assert "not measured" not in card
    assert cu_export(run_copy, "one", "--to", "delta", "--step", 1)[0] == 0
    assert "Unlearned (1), in their order: torch light." in card_of(Path("one"))
    stored = (run_copy / "steps/01/delta.safetensors").read_bytes()
    assert Path("one/delta.safetensors").read_bytes() == stored


# ---------------------------------------------------------------------------------- what is refused
def refused(result: tuple[int, str, str], status: int, *fragments: str) -> None:
    found, _, err = result
    assert err.startswith("cu-export: ")
    assert err.count("\n") == 1, err
    assert found == status, err
    for fragment in fragments:
        assert fragment in err


@pytest.mark.parametrize("damaged", ["delta.safetensors", "predictions.csv", "step.json", "config"])
def test_what_is_not_proven_is_not_exported(run_copy, cu_export, damaged):
    path = run_copy / ("config.yaml" if damaged == "config" else f"steps/02/{damaged}")
    content = bytearray(path.read_bytes())
    place = content.index(b"seeds") if damaged == "config" else len(content) // 2
    content[place : place + 1] = b"7" if content[place : place + 1] != b"7" else b"8"
    path.write_bytes(content)
    refused(cu_export(run_copy, "out", "--to", "delta"), 1, str(path))
    assert not Path("out").exists()


def test_weights_with_new_hashes_are_found_by_their_drift(run_copy):
    record = read_run(run_copy).records[2]
    path = run_copy / "steps/02/delta.safetensors"
    change = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: 2 * each for name, each in change.items()}, path)
    record.files["delta.safetensors"] = sha256_of(path)
    run = read_run(run_copy)
    run.records[2].files["delta.safetensors"] = sha256_of(path)
    with pytest.raises(Exception, match="has drift"):
        load_step(run, 2)


def test_another_base_model_is_not_taken(run_copy, cu_export, pipeline_copy):
    moved = cu_export(run_copy, "moved", f"model.path={pipeline_copy}", "--to", "lora", "--rank", 1)
    assert moved[0] == 0, moved
    assert "rank 1, 22 matrices" in moved[1]
    file = pipeline_copy / "unet/diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["conv_in.bias"][0] += 1
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    result = cu_export(run_copy, "out", f"model.path={pipeline_copy}", "--to", "diffusers")
    refused(result, 1, "was made with another model")
    assert sorted(path.name for path in Path().iterdir()) == ["moved", "outputs", "pipeline"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["out", "--to", "delta", "--step", "3"], 2, "finished requests 1 to 2"),
        (["out", "--to", "delta", "--step", "0"], 2, "is not a whole number from 1 on"),
        (["out", "--to", "onnx"], 2, "invalid choice"),
        (["out", "--to", "delta", "--rank", "2"], 2, "--rank and --keep are of --to lora"),
        (["out", "--to", "lora", "--keep", "1.5"], 2, "is no number above 0 and up to 1"),
        (["out", "train.lr=1", "--to", "lora"], 2, "train.lr=1: an export is of the weights"),
        (["model.path=X", "--to", "lora"], 2, "is an override; give DIR before it"),
    ],
)
def test_bad_input_is_one_line(finished_run, cu_export, words, status, said):
    refused(cu_export(finished_run[1], *words), status, said)
    assert not Path("out").exists()


def test_forms_that_hold_no_gates(run_copy, cu_export, gated, monkeypatch):
    """The weights of a step are replaced by gates; nothing else is looked at by then."""
    monkeypatch.setattr("cu_runner.runner.finished.prove_step", lambda run, index: None)
    shutil.copy(gated[0] / "delta.safetensors", run_copy / "steps/02")
    for form in ("diffusers", "single-file", "lora"):
        refused(cu_export(run_copy, "out", "--to", form), 2, "cannot hold the gates", "--to delta")
    assert cu_export(run_copy, "out", "--to", "delta")[0] == 0
    assert "hook_gates" in card_of(Path("out"))
    model = load_model(BASE, 64, SAMPLER)
    set_change(model, run_copy / "steps/02/delta.safetensors")
    assert torch.equal(our_images(model), our_images(gated[2]))


# ------------------------------------------------------------------------------ what is overwritten
def test_only_an_export_is_replaced_and_only_when_asked(finished_run, cu_export, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert cu_export(finished_run[1], "out", "--to", "delta", "--step", 1)[0] == 0  # it was empty
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(cu_export(finished_run[1], "out", "--to", "delta"), 1, "is not empty", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert cu_export(finished_run[1], "out", "--to", "delta", "--overwrite")[0] == 0
    assert "Unlearned (2)" in card_of(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    result = cu_export(finished_run[1], "mine", "--to", "delta", "--overwrite")
    refused(result, 1, "holds something else than an export")
    (tmp_path / "file").touch()
    refused(cu_export(finished_run[1], "file", "--to", "delta", "--overwrite"), 1, "no directory")
    assert (tmp_path / "mine/thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "out"]


def test_what_is_half_written_never_looks_whole(finished_run, cu_export, tmp_path, monkeypatch):
    assert cu_export(finished_run[1], "out", "--to", "delta", "--step", 1)[0] == 0

    def fail(*arguments: object) -> str:
        folders = [path for path in tmp_path.iterdir() if path.name != "out"]
        assert [path.name[:5] for path in folders] in ([".out."], [".new."])
        raise OSError(28, "No space left on device", str(folders[0]))

    monkeypatch.setattr("cu_runner.reporting.model_card.model_card", fail)
    for name in ("out", "new"):
        result = cu_export(finished_run[1], name, "--to", "delta", "--overwrite")
        refused(result, 1, "No space left on device; mend that or choose another DIR")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "Unlearned (1)" in card_of(tmp_path / "out")


# ------------------------------------------------------------------------------------------ the hub
class Hub:
    """A double of huggingface_hub: repositories by name, and what was done."""

    def __init__(self, held: dict[str, list[str]] | None = None, error: Exception | None = None):
        self.held, self.error, self.calls = held or {}, error, []

    def __call__(self) -> "Hub":
        return self

    def whoami(self) -> dict[str, str]:
        if self.error:
            raise self.error
        return {"name": "me"}

    def create_repo(self, name: str, *, private: bool, exist_ok: bool):
        self.calls.append(("create", name, private))
        assert exist_ok
        return SimpleNamespace(repo_id=f"me/{name}", __str__=lambda: name)

    def list_repo_files(self, name: str) -> list[str]:
        return self.held.get(name, [".gitattributes"])

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns) -> None:
        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload", repo_id, names, commit_message, delete_patterns))


@pytest.fixture
def use_hub(monkeypatch):
    """Returns use(hub, token="secret"): it stands for the hub's library."""

    def use(double: Hub, token: str | None = "hf_secret") -> Hub:
        library = SimpleNamespace(HfApi=double, get_token=lambda: token)
        monkeypatch.setattr(hub, "huggingface_hub", library)
        return double

    return use


def test_an_export_is_pushed(finished_run, cu_export, use_hub):
    double = use_hub(Hub({"me/full": ["README.md"]}))
    words = ["--to", "delta", "--push-to-hub"]
    status, out, err = cu_export(finished_run[1], "out", *words, "mine")
    assert status == 0, err
    said = f"cu-export --to delta: {finished_run[1].name}, request 2"
    pushed = ("upload", "me/mine", ["README.md", "delta.safetensors"], said, None)
    assert double.calls == [("create", "mine", True), pushed]
    assert "pushed: " in out
    refused(
        cu_export(finished_run[1], "other", *words, "full"), 1, "holds files already", "complete"
    )
    assert Path("other/README.md").exists()
    assert cu_export(finished_run[1], "other", *words, "full", "--overwrite")[0] == 0
    assert double.calls[-1][-1] == "*"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (HTTPError("no route to host"), "the hub cannot be reached (HTTPError: no route"),
        (ConnectionResetError(104, "reset"), "the hub cannot be reached"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_line(finished_run, cu_export, use_hub, error, said):
    use_hub(Hub(error=error))
    words = ["--to", "delta", "--push-to-hub", "mine"]
    refused(cu_export(finished_run[1], "out", *words), 1, "--push-to-hub mine: ", said)
    assert not Path("out").exists()


def test_nobody_logged_in_and_a_bad_name_are_one_line(finished_run, cu_export, use_hub):
    use_hub(Hub(), token=None)
    words = ["--to", "delta", "--push-to-hub"]
    refused(cu_export(finished_run[1], "out", *words, "mine"), 1, "not logged in", "hf auth login")
    use_hub(Hub())
    refused(cu_export(finished_run[1], "out", *words, "a/b/c"), 2, "--push-to-hub a/b/c: ")
    assert not Path("out").exists()
