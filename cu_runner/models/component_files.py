"""The parts of a diffusers directory, each read from its folder and refused where it is damaged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cu_runner.models.checkpoint_files import WeightFiles, find_weights
from cu_runner.models.quantised import int8_config
from cu_runner.models.schedulers import build_scheduler, find_scheduler
from cu_runner.models.weight_files import (
    check_finite,
    check_pickle,
    refuse_adapters,
    refuse_strangers,
)
from cu_runner.runtime.lazy import diffusers, torch, transformers
from cu_runner.schema.errors import ModelError, first_line, one_line
from cu_runner.schema.json_files import parse_json

Network = TypeVar("Network")

# What of a whole CLIP its text encoder does not use.
REST_OF_CLIP = re.compile(
    r"logit_scale|text_projection\.weight|visual_projection\.weight|vision_model\..*"
)


def read_index(root: Path) -> dict[str, object]:
    """Read model_index.json of a diffusers directory. Raises ModelError."""
    try:
        index = parse_json((root / "model_index.json").read_text(encoding="utf-8-sig"))
        return dict(index.items())
    except (OSError, ValueError, AttributeError):
        raise ModelError(
            f"{root}: no readable model_index.json; it must be a diffusers directory "
            "(save_pretrained)"
        ) from None


def classes_in(index: Mapping[str, object]) -> dict[str, str]:
    """Return the class of each part that an index names: [library, class], null for none."""
    classes = {}
    for part, entry in index.items():
        match entry:
            case [str(), str(name)]:
                classes[part] = name
    return classes


def read_tokenizer(root: Path, kind: str, name: str) -> transformers.PreTrainedTokenizerBase:
    """Read a tokenizer of a diffusers directory. Raises ModelError."""
    try:
        return getattr(transformers, kind).from_pretrained(root / name)
    except Exception as error:  # of files that are damaged or no tokenizer's, many types
        raise ModelError(f"{root}: {name} cannot be read: {first_line(error)}") from error


def read_scheduler(
    directory: Path, name: str, asked: Mapping[str, object]
) -> diffusers.SchedulerMixin:
    """Read a scheduler from its directory, with other values for what is asked for.

    Raises:
        ModelError: an unknown class, no configuration, or one that the class cannot take.
    """
    file = directory / "scheduler_config.json"
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {first_line(error)}") from None
    try:
        return build_scheduler(find_scheduler(name), config, asked)
    except ValueError as error:
        raise ModelError(f"{file}: the scheduler {name}: {error}") from None


def reason_of(error: Exception, directory: Path) -> str:
    """Return why weights could not be loaded, without a library's advice to its own callers."""
    said = one_line(error)
    if "ignore_mismatched_sizes" in said:
        shapes = re.search(r"because (.*?)\. If you want", said)
        differ = f" ({shapes[1].replace('torch.Size', '')})" if shapes else ""
        return f"the weights do not fit config.json{differ}"
    if said.startswith(("Unable to load weights", "Error while deserializing")):
        return "the weight file is damaged or empty; copy it again"
    if isinstance(error, ArithmeticError):
        config = parse_json((directory / "config.json").read_text(encoding="utf-8"))
        zeros = [key for key, value in config.items() if value == 0 and not isinstance(value, bool)]
        return f"config.json has 0 for {' or '.join(zeros) or 'a size'}, which must be above 0"
    return said


def load_weights(
    kind: type[Network],
    directory: Path,
    allow_pickle: Sequence[str] | None = None,
    int8_but: Sequence[str] | None = None,
) -> Network:
    """Load weights by from_pretrained, in fp32 from local files, refusing what it only warns of.

    Args:
        kind: a model class of diffusers or transformers.
        allow_pickle: pickles that may be read; None never looks at one.
        int8_but: hold linear layers in eight bits, but for modules whose names have one of these
            parts; None holds all in fp32.

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
    place: dict[str, Any] = {
        "variant": files.variant,
        "use_safetensors": safe,
        "local_files_only": True,
    }
    if int8_but is not None:
        place["quantization_config"] = int8_config(library, int8_but)
    try:
        model, info = library.from_pretrained(
            directory, output_loading_info=True, **place, **{dtype: torch.float32}
        )
    except Exception as error:  # damaged files raise many types; the line says which component
        raise ModelError(
            f"{directory}: cannot be loaded as {kind.__name__}: {reason_of(error, directory)}"
        ) from error
    strangers = sorted(name for name in info["unexpected_keys"] if not REST_OF_CLIP.fullmatch(name))
    refuse_adapters(directory, strangers)
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise ModelError(
                f"{directory}: {problem.replace('_', ' ')}, e.g. {next(iter(info[problem]))}; "
                "the weights do not fit config.json"
            )
    refuse_strangers(directory, strangers)
    check_finite(directory, model.state_dict())
    return model
