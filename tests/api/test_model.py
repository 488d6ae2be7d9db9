"""load_model() and what it hands out: which settings a checkpoint takes, and its images."""

import pytest
import torch
from PIL import Image

import cu_runner
from cu_runner.api.model import chosen_by, kind_of
from cu_runner.evaluators.grid import to_picture
from cu_runner.models.sampling import sample_images
from cu_runner.runtime import progress
from cu_runner.schema.errors import ConfigError, ModelError
from cu_runner.schema.settings import Sampler


@pytest.fixture(scope="module")
def untouched():
    return cu_runner.load_model("shapecanvas", device="cpu")


def test_images_are_those_of_a_run(untouched):
    """The prompt and the seed alone decide an image, whatever it is drawn with."""
    prompts = ["a tree image in honey style", "a star image in honey style"]
    two = untouched.generate(prompts, [3, 4], steps=2, guidance=1.5, progress=False)
    expected = sample_images(untouched.diffusion, prompts, [3, 4], Sampler(2, 1.5))
    assert [picture.tobytes() for picture in two] == [
        to_picture(image, 64).tobytes() for image in expected
    ]
    one = untouched.generate(prompts[1], 4, steps=2, guidance=1.5, batch_size=1, progress=False)
    assert one[0].size == (64, 64)
    assert isinstance(one[0], Image.Image)
    assert one[0].tobytes() == two[1].tobytes()


@pytest.mark.parametrize(("prompts", "seeds"), [([], 0), (["a ball"], [1, 2]), (["a", "b"], [1])])
def test_seeds_and_prompts_must_go_together(untouched, prompts, seeds):
    with pytest.raises(ConfigError, match="give one seed for all, or one for each"):
        untouched.generate(prompts, seeds)


@pytest.mark.parametrize("chosen", [{"steps": 0}, {"guidance": "x"}, {"batch_size": 0}])
def test_a_sampler_is_checked(untouched, chosen):
    with pytest.raises(ConfigError, match="generate") as raised:
        untouched.generate("a ball", **chosen)
    assert "\n" not in str(raised.value)


def test_which_preset_a_checkpoint_takes(pipelines):
    assert chosen_by("sdxl", None) == ["model=sdxl"]
    assert chosen_by("stable-diffusion-v1-5/stable-diffusion-v1-5", None) == ["model=sd15"]
    hub = chosen_by("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd14")
    assert hub == ["model=sd14", "model.path='stable-diffusion-v1-5/stable-diffusion-v1-5'"]
    with pytest.raises(ConfigError, match="preset='sd3': no such model; allowed: "):
        chosen_by("x", "sd3")
    assert {kind: kind_of(str(path))[0] for kind, path in pipelines.items() if kind != "sdxl"} == {
        kind: "sd15" for kind in pipelines if kind != "sdxl"
    }
    assert kind_of(str(pipelines["sdxl"]))[0] == "sdxl"


def test_a_single_file_is_taken_for_stable_diffusion_1_5_and_that_is_said(tmp_path, capsys):
    (tmp_path / "model.safetensors").touch()
    assert kind_of(str(tmp_path / "model.safetensors")) == ("sd15", None)
    assert "taken for sd15, preset=... names another" in capsys.readouterr().err


def test_a_directory_brings_its_image_side(pipelines, random_pipeline):
    model = cu_runner.load_model(pipelines["sd15"], device="cpu")
    assert model.preset == "sd15"
    unet, vae = model.diffusion.denoiser.config, model.diffusion.vae.config
    side = unet.sample_size * 2 ** (len(vae.block_out_channels) - 1)
    assert model.diffusion.resolution == side
    assert model.diffusion.precision == "fp32"  # the preset's fp16 is for a GPU
    assert model.diffusion.sampler.scheduler == "DDIMScheduler"
    other = cu_runner.load_model(
        pipelines["sd15"], device="cpu", precision="bf16", settings={"sampler.steps": 3}
    )
    assert (other.diffusion.precision, other.diffusion.sampler.steps) == ("bf16", 3)


def test_what_cannot_be_loaded_is_said(tmp_path):
    with pytest.raises(ModelError, match="no such file or directory"):
        cu_runner.load_model(tmp_path / "nothing")
    with pytest.raises(ModelError, match="no readable unet"):
        cu_runner.load_model(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown setting model\.sise"):
        cu_runner.load_model("shapecanvas", settings={"sise": 3})
    with pytest.raises(ConfigError, match="precision"):
        cu_runner.load_model("shapecanvas", precision="fp8")


def test_stable_diffusion_in_miniature(pipelines):
    """A concept of one's own, on the SD path; the base model stays as it was."""
    model = cu_runner.load_model(pipelines["sd15"], device="cpu", settings={"sampler.steps": 2})
    few = {"train.steps": 1, "train.batch_size": 1, "method.num_anchors": 1}
    edited = cu_runner.unlearn(
        model, ["Van Gogh style"], regularizers=["gradproj"], settings=few, progress=False
    )
    assert edited.drift.l2 > 0
    assert model.drift.l2 == 0
    plain, name = edited.pipeline(), next(iter(edited.delta))
    changed = edited.diffusion.denoiser.get_parameter(name)
    assert torch.equal(plain.unet.get_parameter(name), changed)
    plain.unet.get_parameter(name).data.zero_()  # its weights are its own
    assert changed.any()
    assert all(
        torch.equal(one, two)
        for one, two in zip(
            model.diffusion.denoiser.parameters(), model.fresh().denoiser.parameters(), strict=True
        )
    )


def test_a_notebook_gets_its_own_bar(monkeypatch):
    made = {}

    class Bar:
        disable = False

        def __init__(self, **settings):
            made.update(settings)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    progress.make_bar(desc="x", total=3)
    assert (made["total"], made["disable"]) == (3, False)
    with progress.unseen():
        progress.make_bar(desc="x", total=3)
    assert made["disable"] is True


def test_notes_and_lines_are_not_said_unseen(capsys):
    progress.note("chosen")
    with progress.unseen():
        progress.note("hidden")
        with progress.unseen(False):
            progress.note("hidden too")
    assert capsys.readouterr().err == "chosen\n"
