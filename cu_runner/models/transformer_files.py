"""A diffusers directory with a transformer: its parts, and those that another directory lends it.

Several models may share a T5 of ten gigabytes, or an autoencoder: a directory with a transformer
and a scheduler is enough where `model.shared` names one with the other parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cu_runner.models.architectures import ARCHITECTURES
from cu_runner.models.checkpoint_checks import (
    ENCODERS,
    autoencoder_class,
    transformer_mismatches,
)
from cu_runner.models.checkpoint_files import TRANSFORMER, locate
from cu_runner.models.component_files import (
    classes_in,
    load_weights,
    read_index,
    read_scheduler,
    read_tokenizer,
)
from cu_runner.models.transformers import TransformerComponents
from cu_runner.runtime.lazy import diffusers, transformers
from cu_runner.schema.errors import ModelError

LARGE = (
    "T5EncoderModel",
    "UMT5EncoderModel",
    "Gemma2Model",
)  # text encoders that are worth quantising
ENCODER_NAMES = ("text_encoder", "text_encoder_2", "text_encoder_3")  # folders, in order


@dataclass(frozen=True)
class Part:
    """A part of a model: its folder in a diffusers directory, and its class by the index there."""

    root: Path
    name: str
    kind: str

    @property
    def folder(self) -> Path:
        """Return where its files are."""
        return self.root / self.name


def parts_in(root: Path, index: Mapping[str, object]) -> dict[str, Part]:
    """Return the parts that an index names and that have a folder, by name."""
    return {
        name: Part(root, name, kind)
        for name, kind in classes_in(index).items()
        if (root / name).is_dir()
    }


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
    *,
    tokens: int | None,
    shared: str | None,
    quantised: Literal["int8"] | None,
    allow_pickle: Sequence[str],
) -> TransformerComponents:
    """Read a diffusers directory with a transformer in the place of a UNet. Raises ModelError.

    Args:
        index: its model_index.json.
        tokens: how many of a prompt T5 or Gemma reads.
        shared: where the text encoders and the autoencoder are that it lacks: a diffusers directory
            or the id of a hub repository.
        quantised: how linear layers of the transformer, T5 and Gemma are held that read more than
            the text.
    """
    kind, folder = denoiser_in(root)
    own = parts_in(root, index)
    homes = {root: own}
    if shared is not None:
        other = locate_shared(shared)
        homes[other] = parts_in(other, read_index(other))
    for name in (TRANSFORMER, "scheduler"):
        if name not in own:
            raise ModelError(f"{root}: the component {name} is missing")
    vae = next((parts["vae"] for parts in homes.values() if "vae" in parts), None)
    if vae is None:
        said = "" if shared is None else f", and model.shared={shared} has none either"
        raise ModelError(f"{root}: the component vae is missing{said}")
    if index.get("_class_name") == "PixArtAlphaPipeline" and tokens is None:
        raise ModelError(
            f"{root}: PixArt-alpha reads 120 tokens of a prompt, and the 300 of PixArt-Sigma would "
            "be read; give model.tokens=120"
        )
    encoders = find_encoders(root, kind, homes)
    if shared is not None and all(part.root == root for part in (vae, *encoders)):
        raise ModelError(
            f"model.shared={shared}: {root} has text encoders and an autoencoder of its own; use "
            "shared=null"
        )
    tokenizers = []
    for encoder in encoders:
        name = encoder.name.replace("text_encoder", "tokenizer")
        if name not in homes[encoder.root]:
            raise ModelError(f"{encoder.root}: the component {name} is missing")
        tokenizers.append(homes[encoder.root][name])
    kept = ARCHITECTURES[kind].text_modules if quantised else None
    parts = TransformerComponents(
        load_weights(getattr(diffusers, kind), folder, allow_pickle, kept),
        load_weights(autoencoder_class(vae.root, vae.kind), vae.folder, allow_pickle),
        tuple(
            load_weights(
                getattr(transformers, part.kind),
                part.folder,
                allow_pickle,
                () if quantised and part.kind in LARGE else None,
            )
            for part in encoders
        ),
        tuple(sided(read_tokenizer(part.root, part.kind, part.name)) for part in tokenizers),
        read_scheduler(own["scheduler"].folder, own["scheduler"].kind, {}),
        tokens=tokens,
    )
    for mismatch in transformer_mismatches(parts):
        raise ModelError(f"{root}: {mismatch}")
    return parts


def sided(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> transformers.PreTrainedTokenizerBase:
    """Return a tokenizer that pads on the right, as all of these pipelines make theirs do."""
    tokenizer.padding_side = "right"
    return tokenizer


def locate_shared(shared: str) -> Path:
    """Find the directory of shared parts, without its denoiser. Raises ModelError."""
    try:
        return locate(shared, denoiser=False)
    except ModelError as error:
        raise ModelError(f"model.shared: {error}") from error


def find_encoders(root: Path, kind: str, homes: Mapping[Path, Mapping[str, Part]]) -> list[Part]:
    """Return the text encoders of a transformer, in order. Raises ModelError.

    One that the directory lacks is the shared one of the class that is wanted, whatever its place:
    T5 is the third of Stable Diffusion 3 and the second of FLUX.

    Args:
        kind: the class of the transformer. homes: parts by name, of each directory.
    """
    own = homes[root]
    shared = [part for parts in homes.values() for part in parts.values() if part.root != root]
    for wanted in ENCODERS[kind]:
        chosen: list[Part] = []
        for name, encoder in zip(ENCODER_NAMES, wanted, strict=False):
            # of several of a class that with the same name
            lent = [part for part in shared if part.name == name]
            there = [own[name]] if name in own else [*lent, *shared]
            fit = [part for part in there if part.kind == encoder and part not in chosen]
            chosen += fit[:1]
        unused = [name for name in ENCODER_NAMES[len(wanted) :] if name in own]
        if len(chosen) == len(wanted) and not unused:
            return chosen
    found = {part.name: part.kind for part in (*shared, *own.values())}
    known = ", or ".join(" and ".join(classes) for classes in ENCODERS[kind])
    classes = [found[name] for name in ENCODER_NAMES if name in found]
    raise ModelError(
        f"{root}: the text encoders of {kind} are {known}; found {', '.join(classes) or 'none'}"
        f"{'' if len(homes) == 1 else ', with those of model.shared'}"
    )
