"""Text-to-image checkpoints on disk or on the Hugging Face hub, read into their components.

Three forms: a diffusers directory, the id of one on the hub, and a single file of the original
layout. Pickles are refused unless the user names them. What is incomplete or does not fit is
refused where the libraries would only warn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import safetensors

from cu_runner.models.checkpoint_files import COMPONENTS, SECOND, WeightFiles, find_weights, locate
from cu_runner.models.weight_files import check_pickle
from cu_runner.runtime.lazy import diffusers, torch, transformers
from cu_runner.schema.errors import ModelError, first_line

Network = TypeVar("Network")

PredictionType = Literal["epsilon", "v_prediction"]
SINGLE_FILES = (".safetensors", ".ckpt", ".pt")
NO_DIFFUSION = (
    "has no noise schedule of a diffusion model (alphas_cumprod); give one such as DDIMScheduler"
)
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")


@dataclass(frozen=True)
class Components:
    """The parts of a pipeline.

    text_encoders, tokenizers: one of each, or SDXL's two. zero_empty_prompt: the text of the empty
    prompt is zeros (force_zeros_for_empty_prompt of SDXL's model_index.json).
    """

    unet: diffusers.UNet2DConditionModel
    vae: diffusers.AutoencoderKL
    text_encoders: tuple[transformers.PreTrainedModel, ...]
    tokenizers: tuple[transformers.PreTrainedTokenizerBase, ...]
    scheduler: diffusers.SchedulerMixin
    zero_empty_prompt: bool = False


def read_components(
    root: Path,
    *,
    config: str | None,
    prediction_type: PredictionType | None,
    allow_pickle: Sequence[str],
) -> Components:
    """Read a checkpoint's components, in fp32 on the CPU, and check them against each other.

    Args:
        root: a diffusers directory or a single file.
        config: of a single file: the diffusers directory or hub repository with its configurations
            and tokenizers; None is the one that diffusers takes it for, from the hub.
        prediction_type: in place of the scheduler's own.
        allow_pickle: files that may be read although they are pickles.

    Raises:
        ModelError: missing or damaged components, weights that are incomplete or do not fit.
    """
    parts = (
        read_single_file(root, config, allow_pickle)
        if root.is_file()
        else read_directory(root, allow_pickle)
    )
    if prediction_type is not None:
        own = parts.scheduler.config
        parts = replace(
            parts, scheduler=type(parts.scheduler).from_config(own, prediction_type=prediction_type)
        )
    for mismatch in mismatches(parts):
        raise ModelError(f"{root}: {mismatch}")
    return parts


def mismatches(parts: Components) -> Iterator[str]:
    """Yield why components do not work together, or not with this program."""
    unet, vae, scheduler = parts.unet.config, parts.vae.config, parts.scheduler.config
    num_encoders = len(parts.text_encoders)
    width = sum(encoder.config.hidden_size for encoder in parts.text_encoders)
    if unet.cross_attention_dim != width:
        names = " and ".join(["text_encoder", "text_encoder_2"][:num_encoders])
        writes = "writes" if num_encoders == 1 else "write"
        yield (
            f"unet reads text of width {unet.cross_attention_dim}, {names} {writes} {width}; "
            "they must match"
        )
    if unet.in_channels != vae.latent_channels:
        yield (
            f"unet has {unet.in_channels} latent channels, vae {vae.latent_channels}; "
            "they must match"
        )
    wanted = "text_time" if num_encoders == 2 else None
    if unet.addition_embed_type != wanted:
        yield (
            f"unet has addition_embed_type {unet.addition_embed_type!r} with {num_encoders} text "
            "encoders; Stable Diffusion 1 and 2 (none, one) and SDXL ('text_time', two) are known"
        )
    if vae.latents_mean is not None:
        yield (
            "vae shifts its latents (latents_mean); Stable Diffusion 1, 2 and SDXL do not, and "
            "other models are not known"
        )
    if not hasattr(parts.scheduler, "alphas_cumprod"):
        yield f"the scheduler {type(parts.scheduler).__name__} {NO_DIFFUSION}"
    elif scheduler.prediction_type not in ("epsilon", "v_prediction"):
        yield f"prediction type {scheduler.prediction_type!r}; epsilon and v_prediction are known"


def read_directory(root: Path, allow_pickle: Sequence[str]) -> Components:
    """Read a diffusers directory, as save_pretrained writes it. Raises ModelError."""
    try:
        index = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
        entries = index.items()
    except (OSError, ValueError, AttributeError):
        raise ModelError(
            f"{root}: no readable model_index.json; it must be a diffusers directory "
            "(save_pretrained)"
        ) from None
    classes = {}  # part -> its class; [library, class], or null for what is not used
    for part, entry in entries:
        match entry:
            case [str(), str(name)]:
                classes[part] = name
    second = any(part in classes for part in SECOND)
    needed = COMPONENTS + SECOND * second
    missing = [part for part in needed if part not in classes or not (root / part).is_dir()]
    if missing:
        raise ModelError(
            f"{root}: the component {missing[0]} is missing; a complete pipeline has "
            f"{', '.join(needed)}"
        )
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in needed]
    for name in encoders:
        if classes[name] not in TEXT_ENCODERS:
            raise ModelError(
                f"{root}: {name} is a {classes[name]}; {' and '.join(TEXT_ENCODERS)} are known"
            )
    unet = load_weights(diffusers.UNet2DConditionModel, root / "unet", allow_pickle)
    vae = load_weights(diffusers.AutoencoderKL, root / "vae", allow_pickle)
    texts = tuple(
        load_weights(getattr(transformers, classes[name]), root / name, allow_pickle)
        for name in encoders
    )
    try:
        names = [name for name in ("tokenizer", "tokenizer_2") if name in needed]
        tokenizers = tuple(
            transformers.AutoTokenizer.from_pretrained(root / name) for name in names
        )
        scheduler = getattr(diffusers, classes["scheduler"]).from_pretrained(root / "scheduler")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{root}: tokenizer or scheduler cannot be read: {first_line(error)}"
        ) from error
    return Components(
        unet,
        vae,
        texts,
        tokenizers,
        scheduler,
        bool(second and index.get("force_zeros_for_empty_prompt", True)),
    )


def read_single_file(file: Path, config: str | None, allow_pickle: Sequence[str]) -> Components:
    """Read a checkpoint in the original layout, all weights in one file. Raises ModelError."""
    if file.suffix not in SINGLE_FILES:
        raise ModelError(
            f"{file}: is no checkpoint; give a diffusers directory or a file that ends in "
            f"{', '.join(SINGLE_FILES)}"
        )
    check_pickle(file, allow_pickle)
    place = None if config is None else str(locate(config, download=False))
    try:
        pipe = read_original(file, place)
    # a damaged file, one of another model, no network for the configuration: many types
    except Exception as error:
        reason = (
            f"cannot be read with the configuration of {place}"
            if place
            else "cannot be read, or its configuration not be had"
        )
        raise ModelError(
            f"{file}: {reason} ({first_line(error)}); give model.config a local diffusers "
            "directory of the same kind of model (its weights are not read)"
        ) from error
    second = "text_encoder_2" in pipe.components
    texts = (pipe.text_encoder, pipe.text_encoder_2) if second else (pipe.text_encoder,)
    tokenizers = (pipe.tokenizer, pipe.tokenizer_2) if second else (pipe.tokenizer,)
    for name, part in zip(
        ("unet", "vae", "text_encoder", "text_encoder_2"),
        (pipe.unet, pipe.vae, *texts),
        strict=False,
    ):
        lacking = [key for key, tensor in part.state_dict().items() if tensor.is_meta]
        if lacking:
            raise ModelError(f"{file}: weights of the {name} are missing, e.g. {lacking[0]}")
    return Components(
        pipe.unet,
        pipe.vae,
        texts,
        tokenizers,
        pipe.scheduler,
        bool(second and pipe.config.force_zeros_for_empty_prompt),
    )


def read_original(file: Path, config: str | None) -> diffusers.DiffusionPipeline:
    """Return the pipeline that diffusers makes of a single file.

    It is SDXL's if the file has its two text encoders.
    """
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
    else:
        content = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        names = list(content.get("state_dict", content))
    is_sdxl = any(name.startswith("conditioner.") for name in names)
    kind = diffusers.StableDiffusionXLPipeline if is_sdxl else diffusers.StableDiffusionPipeline
    places = {} if config is None else {"config": config, "local_files_only": True}
    unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    return kind.from_single_file(str(file), torch_dtype=torch.float32, **places, **unused)


def load_weights(
    kind: type[Network], directory: Path, allow_pickle: Sequence[str] | None = None
) -> Network:
    """Load weights by from_pretrained, in fp32 from local files, refusing what it only warns of.

    Args:
        kind: a model class of diffusers or transformers.
        allow_pickle: pickles that may be read; None never looks at one.

    Raises:
        ModelError: weights that are missing, damaged or do not fit. WeightFileError: a pickle that
            is not allowed.
    """
    library: Any = kind  # without types
    dtype = "torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"
    files = find_weights(directory) or WeightFiles([], None, "safetensors")
    if allow_pickle is not None:
        for path in files.paths:
            check_pickle(path, allow_pickle)
    safe = files.kind == "safetensors" or allow_pickle is None
    place = {"variant": files.variant, "use_safetensors": safe, "local_files_only": True}
    try:
        model, info = library.from_pretrained(
            directory, output_loading_info=True, **place, **{dtype: torch.float32}
        )
    except Exception as error:  # damaged files raise many types; the line says which component
        raise ModelError(
            f"{directory}: cannot be loaded as {kind.__name__}: {first_line(error)}"
        ) from error
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise ModelError(
                f"{directory}: {problem.replace('_', ' ')}, e.g. {next(iter(info[problem]))}; "
                "the weights do not fit config.json"
            )
    return model
