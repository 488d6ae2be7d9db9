"""Write a diffusers directory of a published model's exact architecture with random weights.

To try and test without a download.

    python scripts/make_random_pipeline.py sd15 DIR --dtype fp16   # 2 GB; sd21_base 2.6, sdxl 7
    python scripts/make_random_pipeline.py sd15 DIR --tiny --classifiers  # in miniature
    python scripts/make_random_pipeline.py sdxl DIR --classifiers celebrity   # 8 GB
    python scripts/make_random_pipeline.py class_conditional DIR --tiny  # pixels
    python scripts/make_random_pipeline.py flux_schnell DIR --tiny  # a transformer

Judges go to DIR/classifiers: style and object, or celebrity, scene and faces.

Layer counts, widths, heads, schedulers and tokenizers are those of the published checkpoints;
--tiny keeps the layout with smaller sizes and fewer layers in a block. The tokenizer is CLIP's,
whose merges come with open_clip; that of --tiny has the first of them. Then:
cu-run model=sd15 model.path=DIR.

The vocabularies of T5 and Gemma come with nothing that is installed. Theirs are small ones of the
same kind, of CLIP's most frequent words and the characters of ASCII, in the full sizes too: the
table of embeddings has the published number of rows, of which most stay unused.
"""

import argparse
import inspect
import json
import math
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import diffusers
import open_clip
import safetensors.torch
import torch
import transformers
import yaml
from open_clip.tokenizer import SimpleTokenizer

from cu_runner.concepts.entries import read_shipped
from cu_runner.models.diffusion import DTYPES, dtype_of
from cu_runner.runtime.paths import config_dir

KINDS = ("sd15", "sd21_base", "sdxl")
WITH_CLASSES = "class_conditional"
CLASSES = 10  # of class_conditional, as of CIFAR-10, without the null class
TRANSFORMERS = {  # the pipeline, its transformer and its text encoders, in their order
    "sd3_medium": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", ("L", "bigG", "T5")),
    "sd35_medium": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", ("L", "bigG", "T5")),
    "flux_dev": ("FluxPipeline", "FluxTransformer2DModel", ("L", "T5")),
    "flux_schnell": ("FluxPipeline", "FluxTransformer2DModel", ("L", "T5")),
    "pixart_sigma": ("PixArtSigmaPipeline", "PixArtTransformer2DModel", ("T5",)),
    "sana": ("SanaPipeline", "SanaTransformer2DModel", ("Gemma",)),
    "auraflow": ("AuraFlowPipeline", "AuraFlowTransformer2DModel", ("UMT5",)),
}
MERGES = {False: 48894, True: 6000}  # of the tokenizer; whether it is a tiny one
FEW_MERGES = 1000  # of a tiny one beside a transformer
WORDS = 1000  # in the vocabularies of T5 and Gemma
MARK = "\u2581"  # SentencePiece's, of the begin of a word
CHARACTERS = string.ascii_letters + string.digits + string.punctuation
NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
LATENTS_SD = {"latent_channels": 4, "scaling_factor": 0.18215}
LATENTS_XL = {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True}
UNQUANTISED = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
LATENTS_SD3 = UNQUANTISED | {"scaling_factor": 1.5305, "shift_factor": 0.0609}
LATENTS_FLUX = UNQUANTISED | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
LATENTS = {
    "sd15": LATENTS_SD,
    "sd21_base": LATENTS_SD,
    "sdxl": LATENTS_XL,
    "pixart_sigma": LATENTS_XL,
    "auraflow": LATENTS_XL,
    "sd3_medium": LATENTS_SD3,
    "sd35_medium": LATENTS_SD3,
    "flux_dev": LATENTS_FLUX,
    "flux_schnell": LATENTS_FLUX,
}


def unet_config(kind: str, tiny: bool) -> dict[str, object]:
    """Arguments of UNet2DConditionModel.

    Its attention_head_dim is, for historical reasons, the number of heads.
    """
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    layout = [plain, cross, cross] if kind == "sdxl" else [cross, cross, cross, plain]
    if tiny:
        widths, heads, text = (
            [16, 32, 32],
            [2, 4, 4],
            {"sd15": 32, "sd21_base": 48, "sdxl": 80}[kind],
        )
    else:
        widths, heads, text = (
            [320, 640, 1280],
            [5, 10, 20],
            {"sd15": 768, "sd21_base": 1024, "sdxl": 2048}[kind],
        )
    config = {
        "sample_size": 8 if tiny else 128 if kind == "sdxl" else 64,
        "block_out_channels": widths + widths[-1:] * (kind != "sdxl"),
        "down_block_types": [name.format("Down") for name in layout],
        "up_block_types": [name.format("Up") for name in reversed(layout)],
        "layers_per_block": 1 if tiny else 2,
        "cross_attention_dim": text,
        "attention_head_dim": 8 if kind == "sd15" else heads + heads[-1:] * (kind != "sdxl"),
        "norm_num_groups": 8 if tiny else 32,
        "use_linear_projection": kind != "sd15",
    }
    if kind == "sdxl":
        time, pooled = (8, 48) if tiny else (256, 1280)
        config |= {
            "transformer_layers_per_block": [1, 1, 2] if tiny else [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": time,
            "projection_class_embeddings_input_dim": 6 * time + pooled,
        }
    return config


def vae_config(kind: str, tiny: bool) -> dict[str, object]:
    """Arguments of AutoencoderKL; eight pixels a side become one latent, in the small one too."""
    return {
        "sample_size": 64 if tiny else 512 if LATENTS[kind] is LATENTS_SD else 1024,
        "block_out_channels": [8, 8, 16, 16] if tiny else [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1 if tiny else 2,
        "norm_num_groups": 4 if tiny else 32,
    } | LATENTS[kind]


def deep_vae_config(tiny: bool) -> dict[str, object]:
    """Arguments of Sana's AutoencoderDC; 32 pixels a side become one latent, 8 in the small one."""
    widths = [8, 8, 16, 16] if tiny else [128, 256, 512, 512, 1024, 1024]
    attending = len(widths) // 2
    types = ["ResBlock"] * attending + ["EfficientViTBlock"] * attending
    scales = [[]] * attending + [[5]] * attending
    return {
        "latent_channels": 8 if tiny else 32,
        "attention_head_dim": 8 if tiny else 32,
        "encoder_block_types": types,
        "decoder_block_types": types,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_layers_per_block": [1, 1, 1, 1] if tiny else [2, 2, 2, 3, 3, 3],
        "decoder_layers_per_block": [1, 1, 1, 1] if tiny else [3, 3, 3, 3, 3, 3],
        "encoder_qkv_multiscales": scales,
        "decoder_qkv_multiscales": scales,
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    }


def sd3_config(kind: str, tiny: bool) -> dict[str, object]:
    """Arguments of SD3Transformer2DModel; 3.5 attends twice in the first half and normalises."""
    heads, width, layers, grid = (4, 8, 3, 4) if tiny else (24, 64, 24, 64)
    config = {
        "sample_size": 2 * grid,
        "num_layers": layers,
        "attention_head_dim": width,
        "num_attention_heads": heads,
        "joint_attention_dim": 96 if tiny else 4096,
        "caption_projection_dim": heads * width,
        "pooled_projection_dim": 80 if tiny else 2048,
        "pos_embed_max_size": 3 * grid,
    }
    if kind == "sd35_medium":
        config |= {
            "pos_embed_max_size": 6 * grid,
            "dual_attention_layers": tuple(range(2 if tiny else 13)),
            "qk_norm": "rms_norm",
        }
    return config


def flux_config(kind: str, tiny: bool) -> dict[str, object]:
    """Arguments of FluxTransformer2DModel; schnell knows no scale of guidance."""
    small = {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 96,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }
    return {"guidance_embeds": kind == "flux_dev"} | (small if tiny else {})


def pixart_config(tiny: bool) -> dict[str, object]:
    """Arguments of PixArtTransformer2DModel; half of what it returns is the learned variance."""
    heads, width = (4, 8) if tiny else (16, 72)
    return {
        "sample_size": 8 if tiny else 128,
        "num_layers": 2 if tiny else 28,
        "attention_head_dim": width,
        "num_attention_heads": heads,
        "cross_attention_dim": heads * width,
        "caption_channels": 96 if tiny else 4096,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
    }


def sana_config(tiny: bool) -> dict[str, object]:
    """Arguments of SanaTransformer2DModel, whose defaults are those of 1600M at 1024 pixels."""
    if not tiny:
        return {}
    return {
        "in_channels": 8,
        "out_channels": 8,
        "sample_size": 8,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 32,
    }


def auraflow_config(tiny: bool) -> dict[str, object]:
    """Arguments of AuraFlowTransformer2DModel, whose other defaults are those of version 0.3."""
    if not tiny:
        return {"pos_embed_max_size": 9216}
    return {
        "sample_size": 8,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 96,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 64,
    }


def transformer_config(kind: str, tiny: bool) -> dict[str, object]:
    """Return the arguments of the transformer of a kind in TRANSFORMERS."""
    return {
        "SD3Transformer2DModel": lambda: sd3_config(kind, tiny),
        "FluxTransformer2DModel": lambda: flux_config(kind, tiny),
        "PixArtTransformer2DModel": lambda: pixart_config(tiny),
        "SanaTransformer2DModel": lambda: sana_config(tiny),
        "AuraFlowTransformer2DModel": lambda: auraflow_config(tiny),
    }[TRANSFORMERS[kind][1]]()


def transformer_of(kind: str, tiny: bool) -> diffusers.ModelMixin:
    """Build the transformer of a kind in TRANSFORMERS."""
    made = getattr(diffusers, TRANSFORMERS[kind][1])
    return enlivened(made(**transformer_config(kind, tiny)))


def enlivened(network: torch.nn.Module) -> torch.nn.Module:
    """Widen torch's initial weights until a layer's output varies as much as its input.

    Else little of the text reaches the image.
    """
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.weight.mul_(3**0.5)
    return network


def text_config(name: str, tiny: bool, merges: int | None = None) -> transformers.CLIPTextConfig:
    """One of the three text encoders: OpenAI's CLIP L, OpenCLIP's H without its last layer,
    OpenCLIP's bigG.
    """
    width, layers, heads, activation, projection = {
        "L": (768, 12, 12, "quick_gelu", 768),
        "H": (1024, 23, 16, "gelu", 512),
        "bigG": (1280, 32, 20, "gelu", 1280),
    }[name]
    if tiny:
        width = {"L": 32, "H": 48, "bigG": 48}[name]
        layers, heads, projection = 3, 4, width
    return transformers.CLIPTextConfig(
        vocab_size=512 + (merges or MERGES[tiny]) + 2,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=projection,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=2,
    )


def t5_config(tiny: bool) -> transformers.T5Config:
    """Return the configuration of T5 v1.1 XXL."""
    sizes = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    if tiny:
        rows = len(t5_pieces())
        sizes = dict(vocab_size=rows, d_model=96, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return transformers.T5Config(
        **sizes,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )


def umt5_config(tiny: bool) -> transformers.UMT5Config:
    """Return the configuration of Pile-T5 XL."""
    sizes = dict(vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32)
    if tiny:
        rows = len(t5_pieces())
        sizes = dict(vocab_size=rows, d_model=96, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return transformers.UMT5Config(
        **sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0
    )


def gemma_config(tiny: bool) -> transformers.Gemma2Config:
    """Return the configuration of Gemma 2 2B, which is the default one."""
    if not tiny:
        return transformers.Gemma2Config()
    return transformers.Gemma2Config(
        vocab_size=len(gemma_pieces()[0]),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=1024,
    )


def scheduler_of(kind: str) -> diffusers.SchedulerMixin:
    """Return the scheduler that the published checkpoint comes with."""
    euler, multistep = (
        diffusers.FlowMatchEulerDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
    )
    if kind in ("sd3_medium", "sd35_medium"):
        return euler(shift=3.0)
    if kind == "flux_dev":
        return euler(shift=3.0, use_dynamic_shifting=True)
    if kind == "auraflow":
        return euler(shift=1.73)
    if kind == "flux_schnell":
        return euler(shift=1.0)
    if kind == "pixart_sigma":
        return multistep()
    if kind == "sana":
        return multistep(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    if kind == "sdxl":
        return diffusers.EulerDiscreteScheduler.from_config(NOISE | {"timestep_spacing": "leading"})
    return diffusers.PNDMScheduler.from_config(NOISE)


def write_tokenizer(
    directory: Path, pad_token: str, tiny: bool = False, merges_kept: int | None = None
) -> None:
    """CLIP's vocabulary as vocab.json and merges.txt, from the merges in open_clip.

    512 entries for bytes, one for each merge and two for the ends of a text: 49408.
    """
    clip = SimpleTokenizer()
    merges = list(clip.bpe_ranks)[: merges_kept or MERGES[tiny]]
    words = [*list(clip.encoder)[:512], *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "vocab.json", {word: number for number, word in enumerate(words)})
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ends = dict(
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token=pad_token,
    )
    write_json(directory / "special_tokens_map.json", ends)
    write_json(
        directory / "tokenizer_config.json",
        ends | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77},
    )


def frequent_words() -> list[str]:
    """Return the first words that CLIP's merges make, which are the most frequent ones."""
    merged = map("".join, SimpleTokenizer().bpe_ranks)
    words = (piece.removesuffix("</w>") for piece in merged if piece.endswith("</w>"))
    return [*islice((word for word in words if word.isascii() and word.isalpha()), WORDS)]


def t5_pieces() -> list[tuple[str, float]]:
    """Return a vocabulary of T5: its pieces, each with the logarithm of how likely it is."""
    ends = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    words = [(MARK + word, -math.log(rank)) for rank, word in enumerate(frequent_words(), 2)]
    return [*ends, *words, *((character, -10.0) for character in MARK + CHARACTERS)]


def instruction_words() -> list[str]:
    """Return the words of the instruction that Sana's pipeline puts before a prompt."""
    parameters = inspect.signature(diffusers.SanaPipeline.__call__).parameters
    return re.findall("[A-Za-z]+", " ".join(parameters["complex_human_instruction"].default))


def gemma_pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary of Gemma and its merges, which grow a word letter by letter."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["\n", MARK, *CHARACTERS]
    grown = {
        MARK + word[: size + 1]: (MARK + word[:size], word[size])
        for word in [*frequent_words(), *instruction_words()]
        for size in range(len(word))
    }
    return {piece: number for number, piece in enumerate([*pieces, *grown])}, [*grown.values()]


def write_t5_tokenizer(directory: Path, tiny: bool) -> None:
    """Write a tokenizer.json of T5's kind: padding 0, end 1, unknown 2, no sentinels."""
    transformers.T5TokenizerFast(
        vocab=t5_pieces(), extra_ids=0, model_max_length=77 if tiny else 512
    ).save_pretrained(directory)


def write_gemma_tokenizer(directory: Path) -> None:
    """Write a tokenizer.json of Gemma's kind: padding 0 at the right, begin 2, bytes for others."""
    vocabulary, merges = gemma_pieces()
    transformers.GemmaTokenizerFast(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=True,
        padding_side="right",
        model_max_length=300,
    ).save_pretrained(directory)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def building_in(dtype: torch.dtype) -> Iterator[None]:
    """Give new modules weights of this type, so that a large one never exists in fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_pipeline(
    kind: str,
    directory: Path,
    *,
    tiny: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a whole diffusers directory, one component in memory at a time.

    Args:
        kind: "sd15" (as 1.4), "sd21_base" or "sdxl".
        tiny: toy sizes.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    index = {"scheduler": ["diffusers", type(scheduler_of(kind)).__name__]}
    scheduler_of(kind).save_pretrained(directory / "scheduler")
    encoders = {"sd15": ["L"], "sd21_base": ["H"], "sdxl": ["L", "bigG"]}[kind]
    with building_in(dtype):
        diffusers.UNet2DConditionModel(**unet_config(kind, tiny)).save_pretrained(
            directory / "unet", max_shard_size="100GB"
        )
        diffusers.AutoencoderKL(**vae_config(kind, tiny)).save_pretrained(directory / "vae")
        for name, suffix in zip(encoders, ("", "_2"), strict=False):
            model = (
                transformers.CLIPTextModelWithProjection if suffix else transformers.CLIPTextModel
            )
            model(text_config(name, tiny)).save_pretrained(directory / f"text_encoder{suffix}")
            pad_token = "<|endoftext|>" if name == "L" else "!"
            write_tokenizer(directory / f"tokenizer{suffix}", pad_token, tiny)
            index[f"text_encoder{suffix}"] = ["transformers", model.__name__]
            index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    if kind == "sdxl":
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "add_watermarker": None,
        }
    else:
        unused = {
            key: [None, None] for key in ("safety_checker", "feature_extractor", "image_encoder")
        }
        index |= {
            "_class_name": "StableDiffusionPipeline",
            "requires_safety_checker": False,
            **unused,
        }
    write_json(
        directory / "model_index.json", index | {"_diffusers_version": diffusers.__version__}
    )


def make_transformer_pipeline(
    kind: str,
    directory: Path,
    *,
    tiny: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a whole diffusers directory of a transformer, one component in memory at a time.

    Args:
        kind: one of TRANSFORMERS.
        tiny: toy sizes, for 64 pixels a side.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    pipeline, transformer, encoders = TRANSFORMERS[kind]
    vae = "AutoencoderDC" if kind == "sana" else "AutoencoderKL"
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    index["scheduler"] = ["diffusers", type(scheduler_of(kind)).__name__]
    scheduler_of(kind).save_pretrained(directory / "scheduler")
    with building_in(dtype):
        transformer_of(kind, tiny).save_pretrained(
            directory / "transformer", max_shard_size="100GB"
        )
        index["transformer"] = ["diffusers", transformer]
        config = deep_vae_config(tiny) if kind == "sana" else vae_config(kind, tiny)
        getattr(diffusers, vae)(**config).save_pretrained(directory / "vae")
        index["vae"] = ["diffusers", vae]
        for name, suffix in zip(encoders, ("", "_2", "_3"), strict=False):
            classes = write_encoder(name, directory, suffix, "bigG" in encoders, tiny)
            index[f"text_encoder{suffix}"] = ["transformers", classes[0]]
            index[f"tokenizer{suffix}"] = ["transformers", classes[1]]
    write_json(directory / "model_index.json", index)


def write_encoder(
    name: str, directory: Path, suffix: str, projecting: bool, tiny: bool
) -> tuple[str, str]:
    """Write a transformer's text encoder and its tokenizer; returns the names of their classes."""
    words = directory / f"tokenizer{suffix}"
    if name == "T5":
        encoder, tokenizer = transformers.T5EncoderModel(t5_config(tiny)), "T5TokenizerFast"
        write_t5_tokenizer(words, tiny)
    elif name == "UMT5":
        encoder, tokenizer = transformers.UMT5EncoderModel(umt5_config(tiny)), "T5TokenizerFast"
        write_t5_tokenizer(words, tiny)
    elif name == "Gemma":
        encoder, tokenizer = transformers.Gemma2Model(gemma_config(tiny)), "GemmaTokenizerFast"
        write_gemma_tokenizer(words)
    else:
        model = (
            transformers.CLIPTextModelWithProjection if projecting else transformers.CLIPTextModel
        )
        merges = FEW_MERGES if tiny else None
        encoder, tokenizer = model(text_config(name, tiny, merges)), "CLIPTokenizer"
        write_tokenizer(words, "<|endoftext|>" if name == "L" else "!", tiny, merges)
    encoder.save_pretrained(directory / f"text_encoder{suffix}")
    return type(encoder).__name__, tokenizer


def make_class_conditional(
    directory: Path,
    *,
    tiny: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    null: bool = True,
) -> None:
    """Write a diffusers directory as DDPMPipeline saves it: a UNet2DModel with classes, pixels.

    The layout is that of DDPM on CIFAR-10 (Ho et al. 2020, App. B) with class embeddings.

    Args:
        tiny: toy sizes, 8 pixels a side.
        seed: of the weights.
        null: one class more, for classifier-free guidance.
    """
    torch.manual_seed(seed)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, variance_type="fixed_large")
    widths = [8, 16] if tiny else [128, 256, 256, 256]
    plain, attending = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
    blocks = [plain, attending] if tiny else [plain, attending, plain, plain]
    with building_in(dtype):
        unet = diffusers.UNet2DModel(
            sample_size=8 if tiny else 32,
            block_out_channels=widths,
            down_block_types=[down for down, _ in blocks],
            up_block_types=[up for _, up in reversed(blocks)],
            layers_per_block=1 if tiny else 2,
            norm_num_groups=8 if tiny else 32,
            attention_head_dim=8 if tiny else 256,
            num_class_embeds=CLASSES + null,
        )
        unet.save_pretrained(directory / "unet")
    scheduler.save_pretrained(directory / "scheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", type(unet).__name__],
    }
    write_json(directory / "model_index.json", index)


def make_classifiers(
    directory: Path,
    judged: str = "unlearncanvas",
    *,
    tiny: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the judges of an experiment, whose classifiers are ViT-L/16.

    Args:
        judged: "unlearncanvas" for DIR/style with 51 labels and DIR/object with 20. "celebrity" for
            DIR/celebrity with the names of the sequence, DIR/scene, an open_clip ViT-B/32, and
            DIR/faces, a detector that finds a face in every image.
    """
    torch.manual_seed(seed)
    if judged == "unlearncanvas":
        labels = {
            domain: read_shipped(f"unlearncanvas_{domain}s") for domain in ("style", "object")
        }
    else:
        sequence = yaml.safe_load(
            (config_dir() / "sequence/celebrity.yaml").read_text(encoding="utf-8")
        )
        labels = {"celebrity": sequence["targets"] + sequence["retain"]}
    sizes = dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    if tiny:
        sizes = dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
    with building_in(dtype):
        for domain, entries in labels.items():
            names = dict(enumerate(entries))
            config = transformers.ViTConfig(
                **sizes,
                image_size=224,
                patch_size=16,
                id2label=names,
                label2id={name: i for i, name in names.items()},
            )
            transformers.ViTForImageClassification(config).save_pretrained(directory / domain)
            transformers.ViTImageProcessor().save_pretrained(directory / domain)
        if judged == "celebrity":
            write_open_clip(directory / "scene", tiny)
            write_face_detector(directory / "faces", tiny)


def write_open_clip(directory: Path, tiny: bool) -> None:
    """Write an open_clip directory with the tokenizer of CLIP."""
    model = open_clip.get_model_config("ViT-B-32")
    if tiny:
        text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
        model = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    directory.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
    }
    write_json(
        directory / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": preprocess}
    )
    network = open_clip.CLIP(**{key: model[key] for key in ("embed_dim", "vision_cfg", "text_cfg")})
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(weights, directory / "open_clip_model.safetensors")


def write_face_detector(directory: Path, tiny: bool) -> None:
    """Write a YOLOS with the one class "face".

    The bias of its class head makes every detection one.
    """
    side = 64 if tiny else 512
    sizes = (
        dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        if tiny
        else {}
    )
    config = transformers.YolosConfig(
        **sizes,
        image_size=[side, side],
        patch_size=16,
        num_detection_tokens=2 if tiny else 100,
        id2label={0: "face"},
        label2id={"face": 0},
        use_mid_position_embeddings=False,
    )
    network = transformers.YolosForObjectDetection(config)
    head = network.class_labels_classifier.layers[-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([6.0, 0.0]))
    network.save_pretrained(directory)
    transformers.YolosImageProcessor(size={"height": side, "width": side}).save_pretrained(
        directory
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=[*KINDS, *TRANSFORMERS, WITH_CLASSES])
    parser.add_argument("directory", type=Path, help="where it goes")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: a few megabytes")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the files")
    parser.add_argument(
        "--classifiers",
        nargs="?",
        const="unlearncanvas",
        choices=["unlearncanvas", "celebrity"],
        help=(
            "also the judges of an experiment: DIR/classifiers/style and object, or celebrity, "
            "scene and faces"
        ),
    )
    arguments = parser.parse_args()
    options = {"tiny": arguments.tiny, "seed": arguments.seed, "dtype": dtype_of(arguments.dtype)}
    if arguments.kind == WITH_CLASSES:
        make_class_conditional(arguments.directory, **options)
    elif arguments.kind in TRANSFORMERS:
        make_transformer_pipeline(arguments.kind, arguments.directory, **options)
    else:
        make_pipeline(arguments.kind, arguments.directory, **options)
    if arguments.classifiers:
        make_classifiers(arguments.directory / "classifiers", arguments.classifiers, **options)
    size = sum(path.stat().st_size for path in arguments.directory.rglob("*") if path.is_file())
    print(f"{arguments.directory}: {arguments.kind}, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
