"""Checkpoints as the hub and as training scripts have written them since 2022: other names of
weights, configurations with fewer keys, what was saved beside the weights. Each is the same model.
"""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from single_file import original_open_clip, original_weights

from cu_runner.models.checkpoint_files import find_weights
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.loading import load_model
from cu_runner.models.sampling import sample_images
from cu_runner.runtime.seeding import image_noise
from cu_runner.schema.errors import WeightFileError
from cu_runner.schema.settings import Sampler

# What the files of Stable Diffusion 1.4 hold; all else is newer, and left to defaults.
UNET_KEYS = """act_fn attention_head_dim block_out_channels center_input_sample cross_attention_dim
    down_block_types downsample_padding flip_sin_to_cos freq_shift in_channels layers_per_block
    mid_block_scale_factor norm_eps norm_num_groups out_channels sample_size up_block_types"""
VAE_KEYS = """act_fn block_out_channels down_block_types in_channels latent_channels
    layers_per_block out_channels sample_size up_block_types norm_num_groups"""
TEXT_KEYS = """attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_factor
    initializer_range intermediate_size layer_norm_eps max_position_embeddings num_attention_heads
    num_hidden_layers pad_token_id vocab_size projection_dim"""
SCHEDULER_KEYS = "beta_end beta_schedule beta_start num_train_timesteps skip_prk_steps"
PROMPT, SEED = "a painting of a dog in Van Gogh style", 3


def load(path: Path, **more) -> DiffusionModel:
    return load_model(str(path), 64, Sampler(2, 5.0), **more)


def their_image(directory: Path) -> torch.Tensor:
    """What diffusers' own pipeline makes of the prompt."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        directory, safety_checker=None, feature_extractor=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    noise, size = image_noise([PROMPT], [SEED], (4, 8, 8)), {"height": 64, "width": 64}
    made = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "pt"}
    return pipe(PROMPT, latents=noise, **size, **made).images


def keep_keys(file: Path, names: str, **more: object) -> None:
    """Leave only some keys of a configuration, those of a file in its first years."""
    content = json.loads(file.read_text())
    kept = {key: content[key] for key in names.split() if key in content}
    file.write_text(json.dumps(kept | more))


def change_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rename(directory: Path, change) -> None:
    """Save the weights of a component anew, as change({name: tensor}) gives them."""
    file = find_weights(directory).paths[0]
    weights = change(safetensors.torch.load_file(file))
    safetensors.torch.save_file(weights, file, {"format": "pt"})


# ------------------------------------------------------------------------------------ directories
def first_configurations(root: Path) -> None:
    old = {"_diffusers_version": "0.2.2"}
    keep_keys(root / "unet/config.json", UNET_KEYS, _class_name="UNet2DConditionModel", **old)
    keep_keys(root / "vae/config.json", VAE_KEYS, _class_name="AutoencoderKL", **old)
    keep_keys(root / "text_encoder/config.json", TEXT_KEYS, model_type="clip_text_model")
    scheduler = root / "scheduler/scheduler_config.json"
    keep_keys(scheduler, SCHEDULER_KEYS, _class_name="PNDMScheduler", **old)
    more = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    more["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    change_json(root / "model_index.json", _diffusers_version="0.2.2", **more)


def first_tokenizer(root: Path) -> None:
    """tokenizer_config.json of Stable Diffusion 1.4, without tokenizer.json."""
    (root / "tokenizer/tokenizer.json").unlink(missing_ok=True)
    kept = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    token = {"__type": "AddedToken", **kept}
    content = {
        "add_prefix_space": False,
        "bos_token": token | {"content": "<|startoftext|>"},
        "do_lower_case": True,
        "eos_token": token | {"content": "<|endoftext|>"},
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": "<|endoftext|>",
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": token | {"content": "<|endoftext|>"},
    }
    (root / "tokenizer/tokenizer_config.json").write_text(json.dumps(content))


def no_tokenizer_class(root: Path) -> None:
    file = root / "tokenizer/tokenizer_config.json"
    content = json.loads(file.read_text())
    del content["tokenizer_class"]
    file.write_text(json.dumps(content))


def first_attention(root: Path) -> None:
    """Names of the autoencoder's attention before diffusers 0.12."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(weights):
        for new, name in old.items():
            weights = {
                key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): tensor
                for key, tensor in weights.items()
            }
        assert any("proj_attn" in key for key in weights)
        return weights

    rename(root / "vae", change)


def with_prefix(root: Path) -> None:
    """Names of CLIPTextModel before transformers 5.6, with the positions that it once saved."""
    position = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    rename(
        root / "text_encoder",
        lambda weights: (
            position
            | {f"text_model.{name.removeprefix('text_model.')}": w for name, w in weights.items()}
        ),
    )


def whole_clip(root: Path) -> None:
    """Weights of a whole CLIP, of which the text encoder reads its own."""
    more = {"logit_scale": torch.ones([]), "text_projection.weight": torch.ones(32, 32)}
    more["vision_model.embeddings.class_embedding"] = torch.ones(8)
    more["visual_projection.weight"] = torch.ones(32, 8)
    rename(root / "text_encoder", lambda weights: weights | more)


def widths_by_block(root: Path) -> None:
    change_json(root / "unet/config.json", cross_attention_dim=[32] * 4)


def key_of_another_scheduler(root: Path) -> None:
    """PNDMScheduler has no rescale_betas_zero_snr, and its noise is as ever."""
    change_json(root / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)


def weights_for_training(root: Path) -> None:
    file = root / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_name("diffusion_pytorch_model.non_ema.safetensors"))


CHANGES = [
    first_configurations,
    first_tokenizer,
    no_tokenizer_class,
    first_attention,
    with_prefix,
    whole_clip,
    widths_by_block,
    key_of_another_scheduler,
    weights_for_training,
]


def our_image(directory: Path) -> torch.Tensor:
    return sample_images(load(directory), [PROMPT], [SEED], Sampler(2, 5.0))


@pytest.fixture(scope="module")
def plain(pipelines) -> torch.Tensor:
    return our_image(pipelines["sd15"])


@pytest.mark.parametrize("change", CHANGES)
def test_a_directory_of_another_time(pipeline_of, plain, change):
    directory = pipeline_of("sd15")
    change(directory)
    torch.testing.assert_close(our_image(directory), plain, atol=1e-5, rtol=0)


def test_a_directory_of_the_first_years_is_read_by_diffusers_too(pipeline_of, plain):
    directory = pipeline_of("sd15")
    for change in CHANGES:
        change(directory)
    torch.testing.assert_close(plain, their_image(directory), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------ single files
def sd2_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Stable Diffusion 2: open_clip's text encoder, with a last layer that is not read."""
    weights = original_weights(directory)
    first = "cond_stage_model.transformer.text_model."
    text = {
        f"text_model.{name.removeprefix(first)}": weights.pop(name)
        for name in list(weights)
        if name.startswith(first)
    }
    text["text_projection.weight"] = torch.rand(48, 48)
    text = original_open_clip(text) | {"logit_scale": torch.ones([])}
    layer = "transformer.resblocks.2."
    last = {name.replace(layer, "transformer.resblocks.23."): w + 1 for name, w in text.items()}
    text |= {name: tensor for name, tensor in last.items() if ".23." in name}
    return weights | {f"cond_stage_model.model.{name}": tensor for name, tensor in text.items()}


SCHEDULE = ["betas", "alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1"]
SCHEDULE += ["posterior_log_variance_clipped", "log_one_minus_alphas_cumprod", "lvlb_weights"]
CLIP_L = "conditioner.embedders.0"
BESIDE = {
    "sd15": [
        *SCHEDULE,
        *(f"model_ema.diffusion_modelinput_blocks{i}0weight" for i in range(101)),
        "model_ema.decay",
        "model_ema.num_updates",
        "cond_stage_model.logit_scale",
        "cond_stage_model.text_projection",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "first_stage_model.loss.logvar",
    ],
    "sd21_base": SCHEDULE,
    "sdxl": [
        "denoiser.sigmas",
        f"{CLIP_L}.transformer.text_model.embeddings.position_ids",
        f"{CLIP_L}.transformer.text_projection.weight",
        f"{CLIP_L}.logit_scale",
        "conditioner.embedders.1.model.logit_scale",
    ],
}


@pytest.mark.parametrize("kind", BESIDE)
def test_a_single_file_with_what_is_saved_beside_the_weights(pipelines, tmp_path, kind):
    make = sd2_weights if kind == "sd21_base" else original_weights
    weights = make(pipelines[kind]) | {name: torch.ones(2, 2) for name in BESIDE[kind]}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    found = load(tmp_path / "model.safetensors", config=str(pipelines[kind]))
    assert found.fingerprint() == load(pipelines[kind]).fingerprint()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.0.more.weight"),
        ("sdxl", "conditioner.embedders.1.adapter.weight"),
        ("sdxl", f"{CLIP_L}.transformer.text_model.more"),
        ("sdxl", "conditioner.embedders.2.weight"),
        ("sd21_base", "cond_stage_model.model.transformer.resblocks.0.attn.more"),
        ("sd15", "cond_stage_model.more"),
    ],
)
def test_a_key_of_a_text_encoder_that_nothing_takes(pipelines, tmp_path, kind, name):
    make = sd2_weights if kind == "sd21_base" else original_weights
    weights = make(pipelines[kind]) | {name: torch.full((3, 2), 0.7)}
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightFileError, match=f"holds {name}, which no layer takes"):
        load(tmp_path / "model.safetensors", config=str(pipelines[kind]))
