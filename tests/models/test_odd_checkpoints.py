"""Checkpoints that are well-formed and cannot be used as they say: each is refused when it is
loaded, in one line that names the file and the key.
"""

import json
import re
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
import transformers
from single_file import original_weights

from cu_runner.models.checkpoint_files import find_weights
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.loading import load_model
from cu_runner.models.sampling import make_scheduler
from cu_runner.models.schedulers import failure
from cu_runner.models.single_file import mark_scheduler
from cu_runner.schema.errors import ModelError
from cu_runner.schema.settings import Sampler


def load(path: Path | str, **more) -> DiffusionModel:
    return load_model(str(path), 64, Sampler(2, 2.0), **more)


def change_json(path: Path, change: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def change_weights(directory: Path, change) -> None:
    path = find_weights(directory).paths[0]
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path, {"format": "pt"})


def refused(path: Path, message: str, **more) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(path, **more)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


# --------------------------------------------------------------------------------------- schedulers
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train_timesteps": 0}, r"num_train_timesteps=0 \(allowed: whole numbers from 1"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000 "),
        ({"num_train_timesteps": "many"}, "num_train_timesteps='many' "),
        ({"beta_start": "x"}, "beta_start='x' "),
        ({"beta_end": float("nan")}, "beta_end=nan .*noise levels are not between 0 and 1"),
        ({"beta_end": 2.0}, r"beta_end=2.0 "),
        ({"beta_schedule": "foo"}, r"beta_schedule='foo' \(foo is not implemented"),
        ({"trained_betas": ["a"]}, r"trained_betas=\['a'\] "),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas=\[0.1, 0.2\] .*it has 2 noise levels"),
        ({"steps_offset": 5000}, "steps_offset=5000 "),
        ({"timestep_spacing": "foo"}, "timestep_spacing='foo' "),
    ],
)
def test_a_scheduler_that_diffusers_cannot_make(pipelines, tmp_path, change, message):
    """Of a directory whose other parts are only linked."""
    for part in pipelines["sd15"].iterdir():
        if part.name != "scheduler":
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "scheduler").mkdir()
    config = json.loads((pipelines["sd15"] / "scheduler/scheduler_config.json").read_text())
    file = tmp_path / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(config | change))
    found = f"^{re.escape(str(file))}: the scheduler PNDMScheduler: cannot take {message}"
    refused(tmp_path, found + ".*; correct it or leave it out$")
    file.write_text("[]")
    refused(tmp_path, "scheduler_config.json: cannot be read")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DPMSolverSDEScheduler", "needs the package torchsde, and .*; give one such as Euler"),
        ("UnCLIPScheduler", r"cannot be used \(UnCLIPScheduler only supports `beta_schedule`"),
        ("AmusedScheduler", r"cannot be used \(.*mask_token_id"),
        ("RePaintScheduler", r"cannot be used \(.*original_image.*; give one such as DDIM"),
        ("SchedulerMixin", "diffusers has no such scheduler"),
        ("UNet2DConditionModel", "diffusers has no such scheduler"),
    ],
)
def test_a_scheduler_that_is_asked_for_and_cannot_denoise(model, name, message):
    with pytest.raises(ValueError, match=f"^scheduler={name}: {message}") as error:
        make_scheduler(model, Sampler(2, 1.0, name))
    assert "\n" not in str(error.value)


def test_trying_a_scheduler_draws_no_number_of_anyone(random_pipeline):
    state = torch.random.get_rng_state()
    assert failure(diffusers.DDPMScheduler, json.dumps(random_pipeline.NOISE)) is None
    assert torch.equal(torch.random.get_rng_state(), state)


# ------------------------------------------------------------------------------------------ weights
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite(pipeline_of, part):
    directory, spoilt = pipeline_of("sd15"), []

    def spoil(weights):
        spoilt.append(sorted(weights)[3])
        weights[spoilt[0]].view(-1)[0] = {"unet": torch.nan}.get(part, torch.inf)

    change_weights(directory / part, spoil)
    refused(directory, rf"sd15/{part}: {re.escape(spoilt[0])} is not finite")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("form", ["lora", "peft", "other"])
def test_keys_that_no_layer_takes(pipeline_of, part, form):
    def add(weights):
        name = next(name for name in weights if name.endswith("conv_in.weight") or "k_proj" in name)
        if form == "peft":
            weights[name.replace(".weight", ".base_layer.weight")] = weights.pop(name)
        key = {"lora": ".lora_A.default.weight", "peft": ".lora_B.default.weight"}.get(form, ".new")
        weights[name.removesuffix(".weight") + key] = torch.ones(2, 2)

    directory = pipeline_of("sd15")
    change_weights(directory / part, add)
    adapter = r"holds weights of an adapter \(LoRA\), e.g. \S+(lora_|base_layer)\S+, which would"
    wanted = r"holds \S+\.new, which no layer takes" if form == "other" else adapter
    refused(directory, f"sd15/{part}: {wanted}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lora_unet_down_blocks_0.lora_up.weight", "weights of an adapter .*lora_unet_down"),
        ("model.diffusion_model.input_blocks.0.0.lora_down", "weights of an adapter"),
        ("model.diffusion_model.more.weight", "holds model.diffusion_model.more.weight, which no"),
        ("first_stage_model.more.weight", "holds first_stage_model.more.weight, which no"),
        ("cond_stage_model.transformer.text_model.more", "holds cond_stage_model.transformer.text"),
        ("embedding_manager.x", "holds embedding_manager.x, which no layer takes, and 0 more"),
    ],
)
def test_keys_of_a_single_file_that_no_layer_takes(pipelines, tmp_path, name, message):
    path, weights = tmp_path / "model.safetensors", original_weights(pipelines["sd15"])
    safetensors.torch.save_file(weights | {name: torch.full((3, 2), 0.7)}, path)
    refused(path, message, config=str(pipelines["sd15"]))


def test_what_a_published_single_file_holds_beside_its_weights(pipelines, tmp_path):
    path, weights = tmp_path / "model.safetensors", original_weights(pipelines["sd15"])
    more = ["betas", "sqrt_alphas_cumprod", "log_one_minus_alphas_cumprod", "posterior_variance"]
    more += ["model_ema.decay", "model_ema.diffusion_modelinput_blocks00bias", "denoiser.sigmas"]
    position = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    unread = {name: torch.ones(2) for name in more} | {position: torch.arange(77)[None]}
    safetensors.torch.save_file(weights | unread, path)
    plain = load(pipelines["sd15"]).fingerprint()
    assert load(path, config=str(pipelines["sd15"])).fingerprint() == plain
    key = "first_stage_model.decoder.conv_out.bias"
    weights[key][1] = -torch.inf
    safetensors.torch.save_file(weights, path)
    refused(path, "vae: decoder.conv_out.bias is not finite", config=str(pipelines["sd15"]))


def test_the_marker_keys_of_a_single_file(pipelines, random_pipeline, tmp_path):
    path, weights = tmp_path / "model.safetensors", original_weights(pipelines["sdxl"])
    config = str(pipelines["sdxl"])
    both = {"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}
    safetensors.torch.save_file(weights | both, path)
    found = load(path, config=config).scheduler
    assert (found.config.prediction_type, found.config.rescale_betas_zero_snr) == (
        "v_prediction",
        True,
    )
    assert found.alphas_cumprod[-1] < 1e-6
    safetensors.torch.save_file(weights | {"ztsnr": torch.ones(1)}, path)
    refused(path, "ends in pure noise .* prediction type is epsilon", config=config)
    euler = random_pipeline.scheduler_of("sdxl")
    marked = mark_scheduler(path, ["v_pred", "x"], euler, {}).config
    assert (marked.prediction_type, marked.rescale_betas_zero_snr) == ("v_prediction", False)
    asked = mark_scheduler(path, ["v_pred"], euler, {"prediction_type": "epsilon"})
    assert asked.config.prediction_type == "epsilon"
    with pytest.raises(ModelError, match="its key ztsnr asks for rescale_betas_zero_snr, which PN"):
        mark_scheduler(path, list(both), random_pipeline.scheduler_of("sd15"), {})


# ------------------------------------------------------------------- inputs that are not supplied
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sd15", {"time_cond_proj_dim": 8}, "time_cond_proj_dim=8: it asks for the guidance scale"),
        ("sd15", {"num_class_embeds": 3}, "num_class_embeds=3: it asks for a class label"),
        ("sd15", {"class_embed_type": "timestep"}, "class_embed_type='timestep': it asks for a"),
        ("sd15", {"encoder_hid_dim": 32}, "encoder_hid_dim=32: it asks for a text or an image"),
        ("sd15", {"addition_embed_type": "text"}, "addition_embed_type 'text' with 1 text enc"),
        ("sd15", {"attention_type": "gated"}, "attention_type='gated': it asks for places"),
        ("sd15", {"out_channels": 8}, "out_channels=8 and in_channels=4; models that predict"),
    ],
)
def test_a_unet_that_asks_for_more(pipeline_of, kind, change, message):
    directory = pipeline_of(kind)
    config = json.loads((directory / "unet/config.json").read_text()) | change
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(directory / "unet")
    refused(directory, f"unet has {message}")


@pytest.mark.parametrize(
    ("kind", "file", "change", "message"),
    [
        (
            "sd15",
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderTiny"]},
            "vae is a AutoencoderTiny; known: AutoencoderKL$",
        ),
        ("sd15", "vae/config.json", {"_class_name": "AutoencoderTiny"}, "vae is a AutoencoderTiny"),
        (
            "sd15",
            "model_index.json",
            {"unet": ["diffusers", "UNet3DConditionModel"]},
            "unet is a UNet3DConditionModel; known: UNet2D",
        ),
        (
            "sd15",
            "model_index.json",
            {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
            "text_encoder is a CLIPTextModelWithProjection; Stable Diffusion 1 and 2 read that of",
        ),
        (
            "sdxl",
            "model_index.json",
            {"text_encoder_2": ["transformers", "CLIPTextModel"]},
            "text_encoder_2 is a CLIPTextModel; SDXL reads that of a CLIPTextModelWithProjection",
        ),
        ("sd15", "vae/config.json", {"scaling_factor": 0}, "vae has scaling_factor=0; it must"),
        (
            "sdxl",
            "scheduler/scheduler_config.json",
            {"rescale_betas_zero_snr": True},
            "ends in pure noise .*set model.prediction_type=v_prediction if the model predicts v",
        ),
        (
            "sd15",
            "tokenizer/tokenizer_config.json",
            {"model_max_length": 99},
            "tokenizer has model_max_length=99, and its text encoder reads 77 tokens",
        ),
        (
            "sd15",
            "tokenizer/tokenizer_config.json",
            {"model_max_length": "x"},
            "tokenizer has model_max_length='x'; it must be a whole number from 3 on",
        ),
        (
            "sd15",
            "tokenizer/tokenizer_config.json",
            {"model_max_length": 0},
            "tokenizer has model_max_length=0; it must be a whole number from 3 on",
        ),
        (
            "sd15",
            "text_encoder/config.json",
            {"num_attention_heads": 3},
            r"text_encoder: cannot be loaded as CLIPTextModel: .* is not a multiple of the number",
        ),
        (
            "sd15",
            "text_encoder/config.json",
            {"max_position_embeddings": 8},
            "text_encoder: cannot be loaded as CLIPTextModel: the weights do not fit config.json$",
        ),
        (
            "sd15",
            "unet/config.json",
            {"out_channels": 8},
            r"the weights do not fit config.json \(conv_out.* expected shape .* but got .*\)$",
        ),
        (
            "sd15",
            "unet/config.json",
            {"norm_num_groups": 0},
            "config.json has 0 for .*norm_num_groups.*, which must be above 0$",
        ),
        (
            "sdxl",
            "tokenizer_2/tokenizer_config.json",
            {"model_max_length": 50},
            "tokenizer has model_max_length=77, tokenizer_2 50",
        ),
    ],
)
def test_what_no_pipeline_would_notice(pipeline_of, kind, file, change, message):
    directory = pipeline_of(kind)
    change_json(directory / file, change)
    refused(directory, message)


def without_vocabulary(directory: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (directory / name).unlink()


def without_letters(directory: Path) -> None:
    """Leaves the begin and end of a text, and the marks that stand for bytes but letters."""
    path = directory / "vocab.json"
    words = [word for word in json.loads(path.read_text()) if not word[0].isalpha()]
    path.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")


def without_length(directory: Path) -> None:
    path = directory / "tokenizer_config.json"
    content = json.loads(path.read_text())
    del content["model_max_length"]
    path.write_text(json.dumps(content))


def with_placeholder(directory: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<cat>", "<cat>_1"])
    tokenizer.save_pretrained(directory)
    path = find_weights(directory.parent / "text_encoder").paths[0]
    weights = safetensors.torch.load_file(path)
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    weights[name] = torch.cat([weights[name], weights[name][:2]])
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    config = directory.parent / "text_encoder/config.json"
    change_json(config, {"vocab_size": len(weights[name])})


def with_strange_tokens(directory: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<cat>"])
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize("size", [0, 1000])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_weight_file_that_breaks_off(pipeline_of, part, size):
    directory = pipeline_of("sd15")
    path = find_weights(directory / part).paths[0]
    path.write_bytes(path.read_bytes()[:size])
    refused(directory, f"{part}: cannot be loaded as .*: the weight file is damaged or empty; copy")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_vocabulary, "tokenizer has no vocabulary, so that every prompt is the same"),
        (without_letters, "tokenizer has no token of abcdefghijklmnopqrstuvwxyz: words would all"),
        (without_length, "tokenizer has no model_max_length, and its text encoder reads 77 tokens"),
        (with_placeholder, "tokenizer has <cat>, which stands for several vectors"),
        (with_strange_tokens, "tokenizer has tokens up to number 6514, and its text encoder 6514"),
    ],
)
def test_a_tokenizer_that_its_text_encoder_does_not_go_with(pipeline_of, spoil, message):
    directory = pipeline_of("sd15")
    spoil(directory / "tokenizer")
    refused(directory, message)
