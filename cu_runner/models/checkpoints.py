"""Text-to-image checkpoints on disk or on the Hugging Face hub, read into their components.

Three forms: a diffusers directory, the id of one on the hub, and a single file of the original
layout. Pickles are refused unless the user names them. What is incomplete or does not fit is
refused where the libraries would only warn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from cu_runner.concepts.entries import comparable, read_entries
from cu_runner.models.checkpoint_checks import check_classes, class_mismatches, mismatches
from cu_runner.models.checkpoint_files import COMPONENTS, SECOND, TRANSFORMER
from cu_runner.models.component_files import (
    classes_in,
    load_weights,
    read_index,
    read_scheduler,
    read_tokenizer,
)
from cu_runner.models.components import Checkpoint, ClassComponents, Components
from cu_runner.models.single_file import read_single_file
from cu_runner.models.transformer_files import read_transformer
from cu_runner.runtime.lazy import diffusers, transformers
from cu_runner.schema.errors import ModelError

PredictionType = Literal["epsilon", "v_prediction"]
WITH_CLASSES = "UNet2DModel"  # the class of a UNet that reads no text


def read_components(
    root: Path,
    *,
    config: str | None,
    prediction_type: PredictionType | None,
    classes: str | list[str] | None = None,
    tokens: int | None = None,
    shared: str | None = None,
    quantised: Literal["int8"] | None = None,
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
        shared: of a directory with a transformer, another one with the text encoders and the
            autoencoder that it lacks, or the id of one on the hub.
        allow_pickle: files that may be read although they are pickles.

    Raises:
        ModelError: missing or damaged components, weights that are incomplete or do not fit.
    """
    asked = {} if prediction_type is None else {"prediction_type": prediction_type}
    index = {} if root.is_file() else read_index(root)
    if shared is not None and TRANSFORMER not in classes_in(index):
        raise ModelError(
            f"model.shared={shared}: {root} has no transformer, and a model with a UNet brings all "
            "of its parts; use shared=null"
        )
    if classes_in(index).get("unet") == WITH_CLASSES:
        return read_class_conditional(root, index, asked, classes, allow_pickle)
    if classes is not None:
        raise ModelError(
            f"model.classes: {root} reads prompts and has no classes by name; use classes=null"
        )
    if TRANSFORMER in classes_in(index):
        if prediction_type is not None:
            raise ModelError(
                f"model.prediction_type: the scheduler of {root} says what its transformer "
                "predicts; use prediction_type=null"
            )
        return read_transformer(
            root,
            index,
            tokens=tokens,
            shared=shared,
            quantised=quantised,
            allow_pickle=allow_pickle,
        )
    if quantised is not None:
        raise ModelError(
            f"model.quantised={quantised}: {root} has no transformer, and a UNet is mostly "
            "convolutions, which are not quantised; use quantised=null"
        )
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
