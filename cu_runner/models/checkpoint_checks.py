"""What of a checkpoint does not go together, or asks for an input that this program does not give.

diffusers' own pipelines give some of these inputs: without them the images would be others, without
a word.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING

from cu_runner.models.architectures import architecture_of
from cu_runner.models.process import is_flow
from cu_runner.runtime.lazy import diffusers
from cu_runner.schema.errors import ModelError
from cu_runner.schema.json_files import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cu_runner.models.components import Checkpoint, ClassComponents, Components
    from cu_runner.models.transformers import TransformerComponents

CLASSES = {  # component -> classes that are known
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}
SHORTEST = 3  # tokens of a prompt: the first, the last, and one of a word
UNET_INPUTS = {  # key of the UNet's configuration -> the input that it asks for
    "time_cond_proj_dim": "the guidance scale, as models distilled with guidance do (LCM)",
    "num_class_embeds": "a class label beside the prompt",
    "class_embed_type": "a class label beside the prompt",
    "encoder_hid_dim": "a text or an image that is projected first",
    "encoder_hid_dim_type": "a text or an image that is projected first",
}


def check_classes(root: Path, classes: Mapping[str, str]) -> None:
    """Raise ModelError for a component of a directory that is of no known class.

    Args:
        classes: component -> its class by model_index.json; config.json may say another.
    """
    for part in [part for part in CLASSES if part in classes]:
        try:
            config = parse_json((root / part / "config.json").read_text(encoding="utf-8"))
            own = config.get("_class_name", classes[part])  # diffusers writes it
        except (OSError, ValueError, AttributeError):
            own = classes[part]  # it cannot be read; loading says why
        for name in (classes[part], own):
            if name not in CLASSES[part]:
                known = " and ".join(CLASSES[part])
                raise ModelError(f"{root}: {part} is a {name}; known: {known}")
    last = "text_encoder_2" if "text_encoder_2" in classes else "text_encoder"
    projects = classes.get(last) == "CLIPTextModelWithProjection"
    if projects != (last == "text_encoder_2"):
        wanted = "CLIPTextModel" if projects else "CLIPTextModelWithProjection"
        model = "Stable Diffusion 1 and 2 read" if projects else "SDXL reads"
        raise ModelError(f"{root}: {last} is a {classes.get(last)}; {model} that of a {wanted}")


def mismatches(parts: Components) -> Iterator[str]:
    """Yield why components do not work together, or not with this program."""
    unet, vae = parts.denoiser.config, parts.vae.config
    num_encoders = len(parts.text_encoders)
    names = ["text_encoder", "text_encoder_2"][:num_encoders]
    for key, wanted in UNET_INPUTS.items():
        if unet[key] is not None:
            yield f"unet has {key}={unet[key]!r}: it asks for {wanted}, which is not supplied"
    if unet.attention_type != "default":
        yield (
            f"unet has attention_type={unet.attention_type!r}: it asks for places in the image "
            "(GLIGEN), which are not supplied"
        )
    width = sum(encoder.config.hidden_size for encoder in parts.text_encoders)
    read = unet.cross_attention_dim  # of all blocks, or of each
    if {width} != ({read} if isinstance(read, int) else set(read)):
        writes = "writes" if num_encoders == 1 else "write"
        yield (
            f"unet reads text of width {read}, {' and '.join(names)} {writes} {width}; they must "
            "match"
        )
    kind = "text_time" if num_encoders == 2 else None
    if unet.addition_embed_type != kind:
        yield (
            f"unet has addition_embed_type {unet.addition_embed_type!r} with {num_encoders} text "
            "encoders; Stable Diffusion 1 and 2 (none, one) and SDXL ('text_time', two) are known"
        )
    if unet.in_channels != vae.latent_channels:
        yield (
            f"unet has {unet.in_channels} latent channels, vae {vae.latent_channels}; "
            "they must match"
        )
    if unet.out_channels != unet.in_channels:
        yield (
            f"unet has out_channels={unet.out_channels} and in_channels={unet.in_channels}; "
            "models that predict noise alone, with as many of both, are known"
        )
    yield from mismatches_of_vae(parts)
    for name, tokenizer, encoder in zip(names, parts.tokenizers, parts.text_encoders, strict=True):
        yield from mismatches_of_text(name.replace("text_encoder", "tokenizer"), tokenizer, encoder)
    lengths = [tokenizer.model_max_length for tokenizer in parts.tokenizers]
    if len(set(lengths)) > 1:
        yield f"tokenizer has model_max_length={lengths[0]}, tokenizer_2 {lengths[1]}; must match"
    yield from mismatches_of_noise(parts)


PROJECTING = "CLIPTextModelWithProjection"
# By the class of the transformer: those of its text encoders, in order. Stable Diffusion 3 may be
# without T5; one that reads a single CLIP is built like it.
ENCODERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "SD3Transformer2DModel": (
        (PROJECTING, PROJECTING, "T5EncoderModel"),
        (PROJECTING, PROJECTING),
        ("CLIPTextModel",),
    ),
    "FluxTransformer2DModel": (("CLIPTextModel", "T5EncoderModel"),),
    "PixArtTransformer2DModel": (("T5EncoderModel",),),
    "SanaTransformer2DModel": (("Gemma2Model",),),
    "AuraFlowTransformer2DModel": (("UMT5EncoderModel",),),
}
AUTOENCODERS = ("AutoencoderKL", "AutoencoderDC")


def autoencoder_class(root: Path, name: str) -> type[diffusers.ModelMixin]:
    """Return the class of an autoencoder. Raises ModelError for one that is not known."""
    if name not in AUTOENCODERS:
        raise ModelError(f"{root}: its vae is a {name}; known are {', '.join(AUTOENCODERS)}")
    kind: type[diffusers.ModelMixin] = getattr(diffusers, name)
    return kind


def transformer_mismatches(parts: TransformerComponents) -> Iterator[str]:
    """Yield why the parts of a pipeline with a transformer do not work with this program."""
    denoiser, vae = parts.denoiser.config, parts.vae.config
    channels = architecture_of(parts.denoiser).channels(denoiser)
    if vae.latent_channels != channels:
        yield (
            f"transformer denoises {channels} latent channels, vae has {vae.latent_channels}; "
            "they must match"
        )
    factor = vae.scaling_factor
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        yield f"vae has scaling_factor={factor!r}; it must be a number above 0"
    if denoiser.get("use_additional_conditions"):
        yield (
            "transformer has use_additional_conditions: it asks for resolution and aspect ratio, "
            "as PixArt-alpha at 1024 pixels does, which are not supplied"
        )
    if shifts := [key for key in ("latents_mean", "latents_std") if vae.get(key)]:
        yield f"vae normalises its latents ({', '.join(shifts)}), which is not known"
    yield from mismatches_of_width(parts)
    for number, tokenizer in enumerate(parts.tokenizers):
        if unread := unread_letters(tokenizer):
            yield (
                f"tokenizer {number + 1} has no token of {unread}: words would all read as its "
                "unknown token; its vocabulary is not whole"
            )
        size = parts.text_encoders[number].config.vocab_size
        if max(tokenizer.get_vocab().values()) >= size:
            yield (
                f"tokenizer {number + 1} has tokens up to number "
                f"{max(tokenizer.get_vocab().values())}, and its text encoder {size} of them"
            )
    if is_flow(parts.scheduler):
        if parts.scheduler.config.get("stochastic_sampling"):
            yield (
                "the scheduler draws noise that an image's seed does not fix "
                "(stochastic_sampling); set it to false"
            )
        return
    yield from mismatches_of_noise(parts)


def mismatches_of_width(parts: TransformerComponents) -> Iterator[str]:
    """Yield why a transformer cannot read the text encoders' outputs.

    Stable Diffusion 3 fills two of CLIP up with zeros to the width of T5.
    """
    config = parts.denoiser.config
    encoders = [encoder.config for encoder in parts.text_encoders]
    read = config.get("joint_attention_dim") or config.get("caption_channels")
    widths = {"text": (read, encoders[-1].hidden_size)}
    pooled = config.get("pooled_projection_dim")
    if parts.kind == "SD3Transformer2DModel" and len(encoders) > 1:
        widths = widths if len(encoders) == 3 else {}
        widths["pooled text"] = (pooled, sum(each.projection_dim for each in encoders[:2]))
    elif pooled is not None:
        widths["pooled text"] = (pooled, encoders[0].hidden_size)
    for what, (wanted, made) in widths.items():
        if wanted != made:
            yield (
                f"transformer reads {what} of width {wanted}, and the text encoders write {made}; "
                "they must match"
            )


def class_mismatches(parts: ClassComponents) -> Iterator[str]:
    """Yield why a UNet with classes and its scheduler do not work with this program."""
    unet, names = parts.denoiser.config, len(parts.classes)
    embeddings = unet.num_class_embeds
    if unet.class_embed_type is not None:
        yield (
            f"unet has class_embed_type={unet.class_embed_type!r}; class embeddings that are "
            "learned (num_class_embeds alone) are known"
        )
    elif embeddings is None:
        yield "unet has no classes (num_class_embeds), so that nothing names what to unlearn"
    elif embeddings not in (names, names + 1):
        yield (
            f"model.classes has {names} names and the unet {embeddings} classes "
            "(num_class_embeds); give as many, or one less where the last is the null class"
        )
    if (unet.in_channels, unet.out_channels) != (3, 3):
        yield (
            f"unet has in_channels={unet.in_channels} and out_channels={unet.out_channels}; "
            "models that predict noise alone, on images of 3 channels, are known"
        )
    yield from mismatches_of_noise(parts)


def mismatches_of_vae(parts: Components) -> Iterator[str]:
    """Yield why latents cannot be made of images by this autoencoder, or images of latents."""
    config, factor = parts.vae.config, parts.vae.config.scaling_factor
    shifts = [key for key in ("latents_mean", "latents_std", "shift_factor") if config.get(key)]
    if shifts:
        yield (
            f"vae shifts its latents ({', '.join(shifts)}); Stable Diffusion 1, 2 and SDXL do not, "
            "and other models are not known"
        )
    if (config.in_channels, config.out_channels) != (3, 3):
        yield (
            f"vae has in_channels={config.in_channels} and out_channels={config.out_channels}; "
            "images have 3"
        )
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        yield f"vae has scaling_factor={factor!r}; it must be a number above 0"


def mismatches_of_text(
    name: str, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel
) -> Iterator[str]:
    """Yield why a tokenizer does not make the tokens that its text encoder reads."""
    ids, added = tokenizer.get_vocab(), tokenizer.added_tokens_encoder
    most, config = tokenizer.model_max_length, encoder.config
    if not isinstance(most, int) or most < SHORTEST:
        yield (
            f"{name} has model_max_length={most!r}; it must be a whole number from {SHORTEST} on: "
            "correct tokenizer_config.json"
        )
        return
    if not set(ids) - set(added):
        yield (
            f"{name} has no vocabulary, so that every prompt is the same; it needs vocab.json and "
            "merges.txt, or tokenizer.json"
        )
    elif unread := unread_letters(tokenizer):
        yield (
            f"{name} has no token of {unread}: words would all read as its unknown token; its "
            "vocabulary is not whole"
        )
    elif max(ids.values()) >= config.vocab_size:
        yield (
            f"{name} has tokens up to number {max(ids.values())}, and its text encoder "
            f"{config.vocab_size} of them (vocab_size); they must match"
        )
    if most > config.max_position_embeddings:
        says = "no model_max_length" if most > 10**9 else f"model_max_length={most}"
        yield (
            f"{name} has {says}, and its text encoder reads {config.max_position_embeddings} "
            "tokens; correct tokenizer_config.json"
        )
    if several := [token for token in added if f"{token}_1" in added]:
        yield (
            f"{name} has {several[0]}, which stands for several vectors (textual inversion): it "
            f"would be read as one; write {several[0]} {several[0]}_1 ... under other names"
        )


def unread_letters(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the small letters that a tokenizer has no token of, all in one word."""
    read = {
        letter: tokenizer(letter, add_special_tokens=False).input_ids for letter in ascii_lowercase
    }
    return "".join(letter for letter in read if tokenizer.unk_token_id in read[letter])


def mismatches_of_noise(parts: Checkpoint) -> Iterator[str]:
    """Yield why the UNet's predictions cannot be read by the scheduler's noise levels."""
    scheduler = parts.scheduler.config
    if is_flow(parts.scheduler):
        yield (
            f"the scheduler {type(parts.scheduler).__name__} samples a rectified flow, and "
            f"{type(parts.denoiser).__name__} is known to predict noise or v; give one such as "
            "DDIMScheduler"
        )
        return
    predicted = scheduler.prediction_type
    if predicted not in ("epsilon", "v_prediction"):
        yield f"prediction type {predicted!r}; epsilon and v_prediction are known"
    known = inspect.signature(type(parts.scheduler)).parameters
    rescaled = "rescale_betas_zero_snr" in known and scheduler.rescale_betas_zero_snr
    if predicted == "epsilon" and (rescaled or not parts.scheduler.alphas_cumprod.all()):
        yield (
            "the scheduler ends in pure noise (rescale_betas_zero_snr, zero terminal SNR) and the "
            "prediction type is epsilon, which says nothing of an image there; set "
            "model.prediction_type=v_prediction if the model predicts v, else "
            "rescale_betas_zero_snr=false in scheduler_config.json"
        )
