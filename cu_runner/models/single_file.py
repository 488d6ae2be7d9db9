"""Checkpoints in the original layout of Stable Diffusion and SDXL: all weights in one file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors

from cu_runner.models.checkpoint_files import locate
from cu_runner.models.components import Components
from cu_runner.models.schedulers import build_scheduler
from cu_runner.models.weight_files import (
    COMPUTED,
    check_finite,
    check_pickle,
    load_tensors,
    refuse_adapters,
    refuse_strangers,
)
from cu_runner.runtime.lazy import diffusers, nn, torch
from cu_runner.schema.errors import ModelError, WeightFileError, first_line

SINGLE_FILES = (".safetensors", ".ckpt", ".pt")
# Keys of a single file that say how its model was trained, and what they change of a scheduler.
MARKERS = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
# Where a single file keeps the weights of components.
ORIGINAL = (
    ("model.diffusion_model.", "unet"),
    ("first_stage_model.", "vae"),
    ("cond_stage_model.transformer.text_model.", "text_encoder"),
    ("conditioner.embedders.0.transformer.text_model.", "text_encoder"),
)
# The text encoders of open_clip, of Stable Diffusion 2 and the second of SDXL. Their queries, keys
# and values are one matrix, and a last layer may be there that is not used.
OPEN_CLIP = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.1)\.model\."
    r"(positional_embedding|token_embedding\.weight|ln_final\.(weight|bias)"
    r"|transformer\.resblocks\.\d+\.((ln_[12]|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)"
    r"|attn\.in_proj_(weight|bias)))"
)
# What a single file may hold beside the weights that are read: the training's own averages, loss
# and noise schedule, and what of a whole CLIP its text encoder does not use.
UNREAD = re.compile(
    r"(model_ema\.|denoiser\.|first_stage_model\.loss\.).*"
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.((transformer|model)\.)?"
    r"(logit_scale|attn_mask|text_projection(\.weight)?)"
    r"|(alphas|betas|log|lvlb|posterior|sqrt|logvar|scale_factor|v_pred|ztsnr)\w*"
)


def read_single_file(
    file: Path, config: str | None, asked: Mapping[str, object], allow_pickle: Sequence[str]
) -> Components:
    """Read a checkpoint in the original layout, all weights in one file. Raises ModelError.

    Args:
        asked: what replaces values of the scheduler's configuration.
    """
    if file.suffix not in SINGLE_FILES:
        raise ModelError(
            f"{file}: is no checkpoint; give a diffusers directory or a file that ends in "
            f"{', '.join(SINGLE_FILES)}"
        )
    check_pickle(file, allow_pickle)
    place = None if config is None else str(locate(config, download=False))
    reason = (
        f"cannot be read with the configuration of {place}"
        if place
        else "cannot be read, or its configuration not be had"
    )
    try:
        names = names_in(file)
        refuse_unknown(file, names)
        pipe = read_original(file, names, place)
    except WeightFileError:
        raise
    # a damaged file, one of another model, no network for the configuration: many types
    except Exception as error:
        raise ModelError(
            f"{file}: {reason} ({first_line(error)}); give model.config a local diffusers "
            "directory of the same kind of model (its weights are not read)"
        ) from error
    second = "text_encoder_2" in pipe.components
    texts = (pipe.text_encoder, pipe.text_encoder_2) if second else (pipe.text_encoder,)
    tokenizers = (pipe.tokenizer, pipe.tokenizer_2) if second else (pipe.tokenizer,)
    parts = dict(
        zip(
            ("unet", "vae", "text_encoder", "text_encoder_2"),
            (pipe.unet, pipe.vae, *texts),
            strict=False,
        )
    )
    for name, part in parts.items():
        lacking = [key for key, tensor in part.state_dict().items() if tensor.is_meta]
        if lacking:
            raise ModelError(f"{file}: weights of the {name} are missing, e.g. {lacking[0]}")
        check_finite(f"{file}: {name}", part.state_dict())
    refuse_unread(file, names, parts, allow_pickle)
    return Components(
        pipe.unet,
        pipe.vae,
        texts,
        tokenizers,
        mark_scheduler(file, names, pipe.scheduler, asked),
        bool(second and pipe.config.force_zeros_for_empty_prompt),
    )


def mark_scheduler(
    file: Path,
    names: Sequence[str],
    scheduler: diffusers.SchedulerMixin,
    asked: Mapping[str, object],
) -> diffusers.SchedulerMixin:
    """Return the scheduler of a single file as the file's marker keys and the user want it.

    Args:
        names: of the file's weights.

    Raises:
        ModelError: the scheduler does not have what a marker asks for, or cannot take it.
    """
    kind = type(scheduler)
    marked = dict(MARKERS[name] for name in MARKERS if name in names)
    try:
        made = build_scheduler(kind, scheduler.config, {**marked, **asked})
    except ValueError as error:
        raise ModelError(f"{file}: the scheduler {kind.__name__}: {error}") from None
    for name in (name for name in MARKERS if name in names):
        if MARKERS[name][0] not in inspect.signature(kind).parameters:
            raise ModelError(
                f"{file}: its key {name} asks for {MARKERS[name][0]}, which {kind.__name__} does "
                "not have; give model.config a directory with another scheduler, such as "
                "EulerDiscreteScheduler"
            )
    return made


def names_in(file: Path) -> list[str]:
    """Return the names of the weights in a single file."""
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    content = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    return list(content.get("state_dict", content))


def read_original(
    file: Path, names: Sequence[str], config: str | None
) -> diffusers.DiffusionPipeline:
    """Return the pipeline that diffusers makes of a single file.

    It is SDXL's if the file has its two text encoders.
    """
    is_sdxl = any(name.startswith("conditioner.") for name in names)
    kind = diffusers.StableDiffusionXLPipeline if is_sdxl else diffusers.StableDiffusionPipeline
    places = {} if config is None else {"config": config, "local_files_only": True}
    unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    return kind.from_single_file(str(file), torch_dtype=torch.float32, **places, **unused)


def refuse_unknown(file: Path, names: Sequence[str]) -> None:
    """Raise WeightFileError if a single file holds weights of no component."""
    refuse_adapters(file, names)
    known = tuple(prefix for prefix, _ in ORIGINAL)
    refuse_strangers(
        file,
        [
            name
            for name in names
            if not (name.startswith(known) or OPEN_CLIP.fullmatch(name) or UNREAD.fullmatch(name))
        ],
    )


def refuse_unread(
    file: Path, names: Sequence[str], parts: Mapping[str, nn.Module], allow_pickle: Sequence[str]
) -> None:
    """Raise WeightFileError if a single file holds weights that a component has not taken."""
    read = [name for name in names if not (name.endswith(COMPUTED) or UNREAD.fullmatch(name))]
    for prefix, part in ORIGINAL:
        own = [name for name in read if name.startswith(prefix)]
        taken = parts[part].state_dict()
        if len(own) > len(taken):
            # diffusers renames them: a stranger is known by what it holds
            contents = {(tensor.numel(), tensor.double().sum().item()) for tensor in taken.values()}
            tensors = load_tensors(file, allow_pickle)
            strange = [
                name
                for name in own
                if (tensors[name].numel(), tensors[name].double().sum().item()) not in contents
            ]
            refuse_strangers(file, strange or own[-1:])
