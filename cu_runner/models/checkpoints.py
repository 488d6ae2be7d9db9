"""Text-to-image checkpoints on disk or on the Hugging Face hub, read into their components.

Three forms: a diffusers directory, the id of one on the hub, and a single file of the original
layout. Pickles are refused unless the user names them. What is incomplete or does not fit is
refused where the libraries would only warn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from cu_runner.concepts.entries import comparable, read_entries
from cu_runner.models.architectures import ARCHITECTURES
from cu_runner.models.checkpoint_checks import (
    autoencoder_class,
    check_classes,
    check_encoders,
    class_mismatches,
    mismatches,
    transformer_mismatches,
)
from cu_runner.models.checkpoint_files import (
    COMPONENTS,
    SECOND,
    TRANSFORMER,
    WeightFiles,
    find_weights,
)
from cu_runner.models.components import Checkpoint, ClassComponents, Components
from cu_runner.models.schedulers import build_scheduler, find_scheduler
from cu_runner.models.single_file import read_single_file
from cu_runner.models.transformers import TransformerComponents
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

PredictionType = Literal["epsilon", "v_prediction"]
WITH_CLASSES = "UNet2DModel"  # the class of a UNet that reads no text
# What of a whole CLIP its text encoder does not use.
REST_OF_CLIP = re.compile(
    r"logit_scale|text_projection\.weight|visual_projection\.weight|vision_model\..*"
)


def read_components(
    root: Path,
    *,
    config: str | None,
    prediction_type: PredictionType | None,
    classes: str | list[str] | None = None,
    tokens: int | None = None,
    allow_pickle: Sequence[str],
) -> Checkpoint:
    """Read a checkpoint's components, in fp32 on the CPU, and check them against each other.

    Args:
        root: a diffusers directory or a single file.
        config: of a single file: the diffusers directory or hub repository with its configurations
            and tokenizers; None is the one that diffusers takes it for, from the hub.
        prediction_type: in place of the scheduler's own.
        classes: of a model with classes, their names or where these are listed.
        tokens: of a model with T5 or Gemma, how many of a prompt it reads.
        allow_pickle: files that may be read although they are pickles.

    Raises:
        ModelError: missing or damaged components, weights that are incomplete or do not fit.
    """
    asked = {} if prediction_type is None else {"prediction_type": prediction_type}
    index = {} if root.is_file() else read_index(root)
    if classes_in(index).get("unet") == WITH_CLASSES:
        return read_class_conditional(root, index, asked, classes, allow_pickle)
    if classes is not None:
        raise ModelError(
            f"model.classes: {root} reads prompts and has no classes by name; use classes=null"
        )
    if TRANSFORMER in classes_in(index):
        return read_transformer(root, index, asked, tokens, allow_pickle)
    if tokens is not None:
        raise ModelError(
            f"model.tokens={tokens}: {root} has neither T5 nor Gemma; CLIP reads as many as its "
            "tokenizer says; use tokens=null"
        )
    parts = (
        read_single_file(root, config, asked, allow_pickle)
        if root.is_file()
        else read_directory(root, index, asked, allow_pickle)
    )
    for mismatch in mismatches(parts):
        raise ModelError(f"{root}: {mismatch}")
    return parts


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


def read_class_conditional(
    root: Path,
    index: Mapping[str, object],
    asked: Mapping[str, object],
    classes: str | list[str] | None,
    allow_pickle: Sequence[str],
) -> ClassComponents:
    """Read a diffusers directory of a UNet2DModel with classes and its scheduler.

    Args:
        index: its model_index.json.
        asked: what replaces values of the scheduler's configuration.
        classes: their names, or where these are listed.

    Raises:
        ModelError: a component is missing, or there are other components; the classes are not
            named, or not as many; the UNet has none, or asks for more.
    """
    parts = classes_in(index)
    if others := sorted(set(parts) - {"unet", "scheduler"}):
        raise ModelError(
            f"{root}: has {', '.join(others)} beside a {WITH_CLASSES}; known are such UNets on "
            "pixels, with a scheduler and nothing else (DDPMPipeline)"
        )
    if missing := [part for part in ("unet", "scheduler") if not (root / part).is_dir()]:
        raise ModelError(f"{root}: the component {missing[0]} is missing; it has unet, scheduler")
    scheduler = read_scheduler(root / "scheduler", parts.get("scheduler", ""), asked)
    unet = load_weights(diffusers.UNet2DModel, root / "unet", allow_pickle)
    names = read_classes(classes)
    made = ClassComponents(unet, scheduler, names, len(names) + 1 == unet.config.num_class_embeds)
    for mismatch in class_mismatches(made):
        raise ModelError(f"{root}: {mismatch}")
    return made


def read_classes(source: str | list[str] | None) -> tuple[str, ...]:
    """Return the names of classes, in order. Raises ModelError, or ValueError for a bad list."""
    if source is None:
        raise ModelError(
            "model.classes is not set: the model has classes, which prompts name; give their names "
            "in its order, model.classes=[airplane,automobile,...], or a file with one a line"
        )
    names = read_entries("model.classes", source, repeats=True)
    alike = [comparable(name) for name in names]
    if twice := [name for name, same in zip(names, alike, strict=True) if alike.count(same) > 1]:
        raise ModelError(
            f"model.classes: {twice[0]!r} and {twice[1]!r} are one name; they must differ"
        )
    if not all(alike):
        raise ModelError(f"model.classes: class {alike.index('')} has no name; give each one")
    return tuple(names)


def read_directory(
    root: Path,
    index: Mapping[str, object],
    asked: Mapping[str, object],
    allow_pickle: Sequence[str],
) -> Components:
    """Read a diffusers directory, as save_pretrained writes it. Raises ModelError.

    Args:
        index: its model_index.json.
        asked: what replaces values of the scheduler's configuration.
    """
    classes = classes_in(index)
    second = any(part in classes for part in SECOND)
    needed = COMPONENTS + SECOND * second
    missing = [part for part in needed if part not in classes or not (root / part).is_dir()]
    if missing:
        raise ModelError(
            f"{root}: the component {missing[0]} is missing; a complete pipeline has "
            f"{', '.join(needed)}"
        )
    check_classes(root, {part: classes[part] for part in needed})
    scheduler = read_scheduler(root / "scheduler", classes["scheduler"], asked)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in needed]
    unet = load_weights(diffusers.UNet2DConditionModel, root / "unet", allow_pickle)
    vae = load_weights(diffusers.AutoencoderKL, root / "vae", allow_pickle)
    texts = tuple(
        load_weights(getattr(transformers, classes[name]), root / name, allow_pickle)
        for name in encoders
    )
    tokenizers = tuple(
        read_tokenizer(root, classes[name], name)
        for name in ("tokenizer", "tokenizer_2")
        if name in needed
    )
    return Components(
        unet,
        vae,
        texts,
        tokenizers,
        scheduler,
        bool(second and index.get("force_zeros_for_empty_prompt", True)),
    )


def denoiser_in(root: Path) -> tuple[str, Path]:
    """Return the class of a diffusers directory's denoiser, and the folder of its weights.

    Raises:
        ModelError: there is no model_index.json, or it names no known class.
    """
    classes = classes_in(read_index(root))
    part = TRANSFORMER if TRANSFORMER in classes else "unet"
    kind = classes.get(part, "")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{root}: its {part} is of the class {kind or 'of no name'}; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return kind, root / part


def read_transformer(
    root: Path,
    index: Mapping[str, object],
    asked: Mapping[str, object],
    tokens: int | None,
    allow_pickle: Sequence[str],
) -> TransformerComponents:
    """Read a diffusers directory with a transformer in the place of a UNet. Raises ModelError.

    Args:
        index: its model_index.json.
        asked: what replaces values of the scheduler's configuration.
        tokens: how many of a prompt T5 or Gemma reads.
    """
    if asked:
        raise ModelError(
            f"model.prediction_type: the scheduler of {root} says what its transformer predicts; "
            "use prediction_type=null"
        )
    classes = classes_in(index)
    kind, folder = denoiser_in(root)
    names = [name for name in classes if name.startswith("text_encoder")]
    names = sorted(name for name in names if (root / name).is_dir())
    needed = (TRANSFORMER, "vae", "scheduler", *names, *map(tokenizer_of, names))
    missing = [part for part in needed if part not in classes or not (root / part).is_dir()]
    if missing:
        raise ModelError(f"{root}: the component {missing[0]} is missing")
    check_encoders(root, kind, {name: classes[name] for name in names})
    scheduler = read_scheduler(root / "scheduler", classes["scheduler"], asked)
    parts = TransformerComponents(
        load_weights(getattr(diffusers, kind), folder, allow_pickle),
        load_weights(autoencoder_class(root, classes["vae"]), root / "vae", allow_pickle),
        tuple(
            load_weights(getattr(transformers, classes[name]), root / name, allow_pickle)
            for name in names
        ),
        tuple(
            read_tokenizer(root, classes[tokenizer_of(name)], tokenizer_of(name)) for name in names
        ),
        scheduler,
        tokens=tokens,
    )
    for mismatch in transformer_mismatches(parts):
        raise ModelError(f"{root}: {mismatch}")
    return parts


def tokenizer_of(encoder: str) -> str:
    """Return the folder of the tokenizer that belongs to that of a text encoder."""
    return encoder.replace("text_encoder", "tokenizer")


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
