"""The user's own pictures of a run: does its method train on them, and can all of them be read?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from cu_runner.concepts.picture_folder import PictureFolder
from cu_runner.concepts.sequence import Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.config.targets import Node
from cu_runner.methods.base import Method
from cu_runner.models.pictures import read_picture
from cu_runner.request.images import RetainSet
from cu_runner.request.own_images import captioned_by, read_retained
from cu_runner.runtime.progress import Progress
from cu_runner.schema.errors import ConfigError

KEYS = {"targets": "images", "anchors": "anchor_images"}  # of the sequence, by what they show


def check_pictured(name: str, method: Method[Any], sequence: Sequence) -> None:
    """Refuse with ConfigError pictures that a method would not train on, or too few of them.

    Args:
        name: of the method, in public.
    """
    given = {"targets": sequence.target_pictures, "anchors": sequence.anchor_pictures}
    for kind, folders in given.items():
        if folders and method.pictured != kind:
            own = "no images of targets or anchors that could be given"
            if method.pictured is not None:
                own = f"images of {method.pictured}: give sequence.{KEYS[method.pictured]}"
            raise ConfigError(
                f"sequence.{KEYS[kind]}: method={name} trains on {own}; leave sequence."
                f"{KEYS[kind]} out, or choose a method that takes it (docs/own_images.md)"
            )
        for folder in folders.values():
            if len(folder.paths) < method.least_pictures:
                raise ConfigError(
                    f"{folder.key}: holds {len(folder.paths)} pictures, and method={name} needs "
                    f"{method.least_pictures} with these settings, some of which it holds out "
                    "(method.num_fresh); add pictures, or lower that"
                )
    for concept in sequence.targets:
        captioned_by(sequence.facing(concept), concept, sys.maxsize)


def picture_folders(plan: RunConfig, sequence: Sequence) -> list[PictureFolder]:
    """Return every folder of pictures that the run trains on."""
    folders = [*sequence.target_pictures.values(), *sequence.anchor_pictures.values()]
    nodes: dict[str, Node[Any]] = {"method": plan.method}
    nodes |= {f"reg.{name}": node for name, node in plan.regularizers.items()}
    for place, node in nodes.items():
        for key, value in node.arguments.items():
            if isinstance(value, RetainSet) and value.source == "images":
                said = f"{place}.{key}.name"
                found = [folder for _, folder in read_retained(said, value.name)]
                paths = tuple(path for folder in found for path in folder.paths)
                captions = tuple(text for folder in found for text in folder.captions)
                folders.append(PictureFolder(f"{said}={value.name}", paths, captions))
    return folders


def read_whole(folder: PictureFolder, side: int) -> int:
    """Read every picture of a folder; return how many are smaller than a square of this side.

    Raises:
        ValueError: one is damaged.
    """
    small = 0
    with Progress("own images read", len(folder.paths), "image") as bar:
        for path in folder.paths:
            small += min(read_picture(path, folder.key).size) < side
            bar.advance(1)
    return small


def describe_folders(folders: list[PictureFolder]) -> Iterator[str]:
    """Yield a line on every folder."""
    for folder in folders:
        captions = ", with captions" if folder.captions else ""
        yield f"{len(folder.paths)} pictures{captions}: {folder.key}"
