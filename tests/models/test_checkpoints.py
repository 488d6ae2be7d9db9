"""Where checkpoints come from: directories with safetensors, fp16 files, shards, pickles; single
files; the hub's local cache.
"""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands import assert_one_line
from conftest import SMOKE
from huggingface_hub.utils import filter_repo_objects
from single_file import original_weights

from cu_runner.models.checkpoint_files import find_weights, locate, wanted_files
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import select_parameters
from cu_runner.runner.forecast import delta_bytes
from cu_runner.schema.errors import ModelError, WeightFileError
from cu_runner.schema.settings import Sampler


def load(path: Path | str, **more) -> DiffusionModel:
    return load_model(str(path), 64, Sampler(2, 2.0), **more)


def weights_of(directory: Path, part: str) -> Path:
    return find_weights(directory / part).paths[0]


def to_fp16(path: Path) -> None:
    """Put an fp16 variant in the place of a file of weights."""
    halves = {name: tensor.half() for name, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(
        halves, path.with_name(path.stem + ".fp16.safetensors"), {"format": "pt"}
    )
    path.unlink()


def to_pickle(path: Path) -> Path:
    """Put a pickle in the place of a file of weights; its path."""
    pickle = path.with_name({"model": "pytorch_model"}.get(path.stem, path.stem) + ".bin")
    torch.save(safetensors.torch.load_file(path), pickle)
    path.unlink()
    return pickle


# -------------------------------------------------------------------------------------- directories
def test_fp16_files_are_read_where_there_are_no_others(pipelines, pipeline_of):
    directory, plain = pipeline_of("sdxl"), load(pipelines["sdxl"])
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        to_fp16(weights_of(directory, part))
    model = load(directory)
    for mine, theirs in zip(
        (model.denoiser, model.vae, *model.text_encoders),
        (plain.denoiser, plain.vae, *plain.text_encoders),
        strict=True,
    ):
        for (name, tensor), expected in zip(
            mine.named_parameters(), theirs.parameters(), strict=True
        ):
            assert torch.equal(tensor, expected.half().float()), name
    assert {parameter.dtype for parameter in model.denoiser.parameters()} == {torch.float32}
    assert model.fingerprint() != plain.fingerprint()


def test_full_precision_goes_before_fp16_and_shards_are_one_model(pipelines, pipeline_of):
    directory, plain = pipeline_of("sd15"), load(pipelines["sd15"])
    halves = shutil.copy(
        weights_of(directory, "unet"), directory / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    Path(halves).write_bytes(b"not read")
    plain.denoiser.save_pretrained(directory / "unet", max_shard_size="200KB")
    (directory / "unet/diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    assert len(find_weights(directory / "unet").paths) > 2
    assert load(directory).fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pickle_is_refused_unless_it_is_named(pipelines, pipeline_of, part):
    directory = pipeline_of("sd15")
    pickle = to_pickle(weights_of(directory, part))
    with pytest.raises(
        WeightFileError, match=r"is no .safetensors file, .*; convert it, or allow this one"
    ) as error:
        load(directory)
    assert f"allow_pickle=[{pickle}]" in str(error.value)
    with pytest.raises(WeightFileError, match=r"is no .safetensors file"):
        load(directory, allow_pickle=(str(pickle.parent), str(directory / "vae/other.bin")))
    assert (
        load(directory, allow_pickle=(str(pickle),)).fingerprint()
        == load(pipelines["sd15"]).fingerprint()
    )


def test_a_pickle_that_would_run_code_does_not(pipeline_of, tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    directory = pipeline_of("sd15")
    pickle = to_pickle(weights_of(directory, "unet"))
    torch.save({"conv_in.weight": Harm()}, pickle)
    with pytest.raises(ModelError, match="unet: cannot be loaded"):
        load(directory, allow_pickle=(str(pickle),))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"cross_attention_dim": 32}, "cannot be loaded|must match"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "vae shifts its latents"),
        ("vae/config.json", {"shift_factor": 0.5}, r"vae shifts its latents \(shift_factor\)"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "sample"},
            "prediction type 'sample'; epsilon and v_prediction",
        ),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "text_encoder is a T5EncoderModel; known: CLIPText",
        ),
        (
            "model_index.json",
            {"text_encoder_2": [None, None], "tokenizer_2": [None, None]},
            "width 80, text_encoder writes 32",
        ),
        (
            "model_index.json",
            {"text_encoder_2": None, "tokenizer_2": None},
            "width 80, text_encoder writes 32",
        ),
        ("model_index.json", {"text_encoder_2": None}, "the component text_encoder_2 is missing"),
        ("model_index.json", {"text_encoder": None}, "the component text_encoder is missing"),
        ("model_index.json", {"scheduler": None}, "the component scheduler is missing"),
        ("model_index.json", {"scheduler": ["diffusers"]}, "the component scheduler is missing"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "Nothing"]},
            "the scheduler Nothing: diffusers has no such scheduler",
        ),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
            (
                "the scheduler FlowMatchEulerDiscreteScheduler samples a rectified flow, and "
                "UNet2DConditionModel is known to predict noise or v"
            ),
        ),
    ],
)
def test_components_that_do_not_fit(pipeline_of, file, change, message):
    path = pipeline_of("sdxl") / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message) as error:
        load(path.parents[file.count("/")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{"])
def test_a_model_index_that_is_none(pipeline_of, content):
    directory = pipeline_of("sd15")
    (directory / "model_index.json").write_text(content)
    with pytest.raises(
        ModelError, match=r"sd15: no readable model_index.json; it must be a diffusers directory"
    ):
        load(directory)


def test_a_second_text_encoder_without_its_tokenizer(pipeline_of):
    directory = pipeline_of("sdxl")
    shutil.rmtree(directory / "tokenizer_2")
    with pytest.raises(
        ModelError,
        match=r"the component tokenizer_2 is missing; a complete pipeline has .*text_encoder_2",
    ):
        load(directory)


# ------------------------------------------------------------------------------------- single files
@pytest.fixture
def original(pipelines, tmp_path) -> Path:
    """The sd15 directory as one file in the original layout."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(original_weights(pipelines["sd15"]), path)
    return path


def test_a_single_file_is_the_same_model_as_its_directory(pipelines, original, tmp_path):
    plain = load(pipelines["sd15"])
    assert load(original, config=str(pipelines["sd15"])).fingerprint() == plain.fingerprint()
    pickle = tmp_path / "model.ckpt"
    torch.save({"state_dict": safetensors.torch.load_file(original), "global_step": 7}, pickle)
    with pytest.raises(WeightFileError, match=r"model.ckpt: is no .safetensors file"):
        load(pickle, config=str(pipelines["sd15"]))
    allowed = load(
        pickle,
        config=str(pipelines["sd15"]),
        allow_pickle=(str(pickle),),
        prediction_type="v_prediction",
    )
    assert allowed.scheduler.config.prediction_type == "v_prediction"
    assert all(
        mine.equal(theirs)
        for mine, theirs in zip(
            allowed.denoiser.parameters(), plain.denoiser.parameters(), strict=True
        )
    )


def test_a_single_file_of_sdxl(pipelines, tmp_path):
    """Known by its two text encoders, under `conditioner.`; as a pickle, too."""
    path, plain = tmp_path / "model.safetensors", load(pipelines["sdxl"])
    weights = original_weights(pipelines["sdxl"])
    safetensors.torch.save_file(weights, path)
    made = load(path, config=str(pipelines["sdxl"]))
    assert len(made.text_encoders) == 2
    assert made.components.zero_empty_prompt
    assert made.fingerprint() == plain.fingerprint()
    pickle = tmp_path / "model.ckpt"
    torch.save({"state_dict": weights}, pickle)
    assert (
        load(pickle, config=str(pipelines["sdxl"]), allow_pickle=(str(pickle),)).fingerprint()
        == plain.fingerprint()
    )
    weights.pop("conditioner.embedders.1.model.transformer.resblocks.1.ln_1.weight")
    safetensors.torch.save_file(weights, path)
    with pytest.raises(ModelError, match=r"text_encoder_2 are missing|cannot be read") as error:
        load(path, config=str(pipelines["sdxl"]))
    assert "\n" not in str(error.value)


def test_a_single_file_without_its_configuration(original):
    with pytest.raises(
        ModelError, match=r"give model.config a local diffusers directory of the same kind"
    ) as error:
        load(original)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias",
    ],
)
def test_a_single_file_that_lacks_a_weight(pipelines, original, name):
    weights = safetensors.torch.load_file(original)
    del weights[name]
    safetensors.torch.save_file(weights, original)
    with pytest.raises(ModelError) as error:
        load(original, config=str(pipelines["sd15"]))
    assert "\n" not in str(error.value)


def test_files_that_are_no_checkpoint(original, pipelines, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(
        ModelError,
        match=r"notes.txt: is no checkpoint; give a diffusers directory or a file that ends in",
    ):
        load(tmp_path / "notes.txt")
    original.write_bytes(original.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read"):
        load(original, config=str(pipelines["sd15"]))


# ------------------------------------------------------------------------------------------ the hub
@pytest.fixture
def hub(pipelines, tmp_path, monkeypatch) -> Path:
    """A local cache of the hub, as its client keeps one, that holds some/model; there is no
    network.
    """
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "hub/models--some--model"
    for name, kind in (("a" * 40, "sd15"), ("b" * 40, "sd21_base")):
        shutil.copytree(pipelines[kind], root / "snapshots" / name)
    (root / "refs").mkdir()
    (root / "refs/main").write_text("a" * 40)
    (root / "refs/other").write_text("b" * 40)
    return root


def test_a_repository_in_the_cache_is_used_without_network(hub, pipelines):
    assert load("some/model").fingerprint() == load(pipelines["sd15"]).fingerprint()
    assert (
        load("some/model", revision="other").fingerprint()
        == load(pipelines["sd21_base"]).fingerprint()
    )
    with pytest.raises(
        ModelError,
        match=(
            r"^model.revision=main: .*sd15 is on this machine; only a repository of the hub "
            r"has rev"
        ),
    ):
        load(pipelines["sd15"], revision="main")
    for revision in ("no-such", None):
        with pytest.raises(
            ModelError,
            match=r"the Hugging Face hub did not give it \(\w+\); give model.path a local",
        ) as error:
            load("some/other" if revision is None else "some/model", revision=revision)
        assert "\n" not in str(error.value)


def test_what_is_fetched_from_a_repository():
    """One precision of safetensors, of the parts that are used; not the other formats that
    repositories hold too.
    """
    parts, stem = ("unet", "vae", "text_encoder"), {"text_encoder": "model"}
    present = [
        "model_index.json",
        "README.md",
        "v1-5-pruned.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
    ]
    for part in (*parts, "safety_checker"):
        name = stem.get(part, "diffusion_pytorch_model")
        present += [
            f"{part}/config.json",
            *(f"{part}/{name}{end}" for end in (".safetensors", ".fp16.safetensors", ".bin")),
        ]
    present += [
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/flax_model.msgpack",
        "unet/model.onnx",
    ]
    for variant in ("", ".fp16"):
        wanted = set(filter_repo_objects(present, allow_patterns=wanted_files(variant)))
        expected = {
            f"{part}/{stem.get(part, 'diffusion_pytorch_model')}{variant}.safetensors"
            for part in parts
        }
        assert {name for name in wanted if not name.endswith(".json")} == expected
        assert {
            "model_index.json",
            "unet/config.json",
            "tokenizer/vocab.json",
            "scheduler/scheduler_config.json",
        } <= wanted


def test_a_hub_id_without_network_is_one_line(in_process, hub):
    chosen = ("model=sd15", "model.precision=fp32", "model.resolution=64")
    fragments = [
        "stable-diffusion-v1-5/stable-diffusion-v1-5: no such directory here",
        "give model.path a local diffusers directory",
    ]
    assert_one_line(in_process(*SMOKE, *chosen), 2, fragments)


def test_a_plan_knows_its_disk_where_the_weights_can_be_read(hub, pipelines, original, pipeline_of):
    unet = select_parameters(load(pipelines["sd15"]).denoiser, "kv_xattn")
    size = sum(4 * parameter.numel() for parameter in unet.values())
    for path in (pipelines["sd15"], "some/model", original):
        assert delta_bytes(str(path), None, "kv_xattn") == size
    full = sum(4 * parameter.numel() for parameter in load(pipelines["sd15"]).denoiser.parameters())
    assert delta_bytes(str(original), None, "full") == full
    assert delta_bytes("some/other", None, "kv_xattn") is None  # not on this machine
    directory = pipeline_of("sd15")
    to_pickle(weights_of(directory, "unet"))
    assert delta_bytes(str(directory), None, "kv_xattn") is None
    with pytest.raises(ModelError, match="no such file"):
        delta_bytes("/nowhere", None, "kv_xattn")


def test_a_local_directory_goes_before_a_repository_of_that_name(
    hub, pipelines, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pipelines["sdxl"], tmp_path / "some/model")
    assert locate("some/model") == Path("some/model")
    assert len(load("some/model").text_encoders) == 2
