"""People's own pictures in place of generated images: of targets, of their anchors, of the rest.

Shapes: C latent channels, H W latent size, N pictures.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.concepts.entries import comparable, spread
from cu_runner.concepts.picture_folder import PictureFolder, read_folder
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.concepts.templates import caption_in, fill, fill_caption, replace_word
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.pictures import read_pictures
from cu_runner.runtime.lazy import torch
from cu_runner.runtime.progress import Progress
from cu_runner.schema.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """Pictures to train on, in order. key: the setting that names their folder."""

    key: str
    paths: tuple[Path, ...]

    def encode(self, model: DiffusionModel, batch_size: int, mirrored: bool = False) -> Tensor:
        """Return their latents [N, C, H, W] on the CPU.

        Every picture is cropped to its middle square and resized to the model's resolution.
        mirrored: turned left to right.

        Raises:
            ValueError: a file is damaged. ModelError: a latent is not finite.
        """
        found = []
        with Progress("own images", len(self.paths), "image") as bar:
            for images in read_pictures(self.paths, model.resolution, batch_size, self.key):
                found.append(model.encode_images(images.flip(-1) if mirrored else images).cpu())
                bar.advance(len(images))
        latents = torch.cat(found)
        if not latents.isfinite().all():
            raise ModelError(
                f"{self.key}: the model's autoencoder makes latents that are not finite of these "
                "pictures; use model.precision=fp32"
            )
        return latents


@dataclass(frozen=True)
class TargetImages:
    """What a method trains on of one target.

    prompts: image i has the text of prompt i modulo their number. anchors: of the anchor, one for
    each prompt. pictures: None where the untouched model makes the images of the prompts.
    """

    prompts: list[str]
    anchors: list[str]
    pictures: Pictures | None
    captioned: bool = False  # whether the prompts are the pictures' own captions

    def per_image(self, number: int) -> list[str]:
        """Return the prompt of every image, of which there are `number` without pictures."""
        count = number if self.pictures is None else len(self.pictures.paths)
        return [self.prompts[i % len(self.prompts)] for i in range(count)]


def images_of_target(sequence: Sequence, concept: Concept, number: int) -> TargetImages:
    """Return what shows a target: at most `number` of the user's pictures, or prompts alone.

    Pictures without captions take the target's training prompts in turn. The anchor's prompt of a
    caption is that caption with the anchor in the target's place; where that cannot be told, the
    training prompts of the anchor come in turn.
    """
    pairs = sequence.training_pairs(concept)
    prompts, anchors = [target for target, _ in pairs], [anchor for _, anchor in pairs]
    if (folder := sequence.target_pictures.get(concept.name)) is None:
        return TargetImages(prompts, anchors, None)
    pictures = Pictures(folder.key, tuple(spread(folder.paths, number)))
    if not folder.captions:
        return TargetImages(prompts, anchors, pictures)
    captions = spread(folder.captions, number)
    other = [
        anchored(sequence, concept, caption) or anchors[i % len(anchors)]
        for i, caption in enumerate(captions)
    ]
    return TargetImages(captions, other, pictures, captioned=True)


def anchored(sequence: Sequence, concept: Concept, caption: str) -> str | None:
    """Return a caption of a target with its anchor in its place; None where that cannot be told."""
    name, anchor = concept.prompt_name, concept.anchor or ""
    naming = [template for template in sequence.target_prompt if "{concept}" in template]
    for template in () if sequence.anchor_captions else naming:
        if (found := caption_in(fill(template, concept=name), caption)) is not None:
            return fill(fill_caption(sequence.anchor_prompt, found), anchor=anchor)
    return replace_word(caption, name, anchor) if anchor else None


def captioned_by(sequence: Sequence, concept: Concept, number: int) -> Sequence:
    """Return the sequence whose training captions, for one target, are those of anchor pictures.

    Of at most `number` pictures; without captions it is the sequence itself.

    Raises:
        ValueError: a caption that is not like sequence.anchor_prompt, so that no prompt of the
            target follows from it.
    """
    folder = sequence.anchor_pictures.get(concept.name)
    if folder is None or not folder.captions:
        return sequence
    anchor, captions = concept.anchor or "", []
    for text in spread(folder.captions, number):
        found = caption_in(fill(sequence.anchor_prompt, anchor=anchor), text)
        if sequence.anchor_captions and found and replace_word(found, anchor, "") is None:
            found = None
        if found is None:
            wanted = fill(sequence.anchor_prompt, anchor=anchor)
            held = f" and holds the word {anchor!r}" if sequence.anchor_captions else ""
            raise ValueError(
                f"{folder.key}: the caption {text!r} is not like sequence.anchor_prompt, "
                f"{wanted!r}, so no prompt of the target follows from it; write it so{held}, or "
                "take the captions away"
            )
        captions.append(found)
    if sequence.anchor_captions:
        return replace(sequence, anchor_captions={anchor: tuple(captions)})
    return replace(sequence, captions=tuple(captions))


def anchor_pictures(sequence: Sequence, concept: Concept, number: int) -> Pictures | None:
    """Return at most `number` of the user's pictures of a target's anchor; None without any."""
    if (folder := sequence.anchor_pictures.get(concept.name)) is None:
        return None
    return Pictures(folder.key, tuple(spread(folder.paths, number)))


def read_retained(key: str, name: str | None) -> list[tuple[str | None, PictureFolder]]:
    """Read a folder of what is to be kept: with captions, or with a folder for every concept.

    Returns:
        (concept, pictures): the name of the folder of each concept; None for all, with captions.

    Raises:
        ValueError: there is neither, or as read_folder().
    """
    whole = read_folder(key, name or "")
    if whole.captions:
        return [(None, whole)]
    root = Path(name or "").expanduser()
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    if not folders or any(path.parent == root for path in whole.paths):
        raise ValueError(
            f"{key}={name}: says of no picture what it shows; add captions.txt, metadata.csv or "
            "metadata.jsonl, or put the pictures into one folder for every concept"
        )
    return [(path.name, read_folder(key, str(path))) for path in folders]


def retained_pictures(
    key: str, name: str | None, sequence: Sequence, erased: Ordered[Concept]
) -> list[tuple[Path, str]]:
    """Return every picture of what is to be kept with its caption, the concepts' pictures in turn.

    The folders of concepts that are erased are left out. Without captions a concept's pictures
    take the target's training prompts with its name, in turn.

    Raises:
        ValueError: none is left.
    """
    gone = {comparable(name) for each in erased for name in (each.name, each.prompt_name)}
    labels = {
        comparable(label): label
        for label in (*sequence.vocabulary, *(kept.name for kept in sequence.retain))
    }
    columns = []
    for concept, folder in read_retained(key, name):
        if concept is not None and comparable(concept) in gone:
            continue
        texts = list(folder.captions)
        if concept is not None and not texts:
            label = labels.get(comparable(concept), concept)
            prompts = sequence.prompts_naming(sequence.prompt_name(label))
            texts = [prompts[i % len(prompts)] for i in range(len(folder.paths))]
        columns.append(list(zip(folder.paths, texts, strict=True)))
    longest = max((len(column) for column in columns), default=0)
    found = [column[i] for i in range(longest) for column in columns if i < len(column)]
    if not found:
        raise ValueError(f"{key}={name}: every concept in it is unlearned; add what is to be kept")
    return found
