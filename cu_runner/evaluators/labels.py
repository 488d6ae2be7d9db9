"""The labels of a network's outputs, in the order of the outputs."""

from __future__ import annotations

from pathlib import Path

from cu_runner.concepts.entries import read_entries
from cu_runner.schema.errors import ModelError
from cu_runner.schema.json_files import parse_json

IMAGENET = "imagenet"  # the 1000 classes in their usual order, as open_clip spells them


def read_labels(key: str, source: str | list[str]) -> list[str]:
    """Return the labels of a network.

    Args:
        source: the labels themselves, the name of a shipped list (cu_runner/concepts/lists), a text
            file with one a line, or "imagenet".

    Raises:
        ValueError: there is no such list or file, a label is there twice, or fewer than two are.
    """
    labels = imagenet_classes() if source == IMAGENET else read_entries(key, source, repeats=True)
    if "" in labels:
        raise ValueError(f"{key}: output {labels.index('')} has no label; give every output one")
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        places = " and ".join(str(i) for i, label in enumerate(labels) if label == repeated[0])
        raise ValueError(
            f"{key}: {repeated[0]} stands for two outputs, {places}; labels must differ"
        )
    if len(labels) < 2:
        raise ValueError(f"{key}: {len(labels)} labels; two are the least that can be told apart")
    return labels


def imagenet_classes() -> list[str]:
    """Return the 1000 names of open_clip.

    Of two with one name (missile, sunglasses) the second has its number behind it.
    """
    from open_clip import IMAGENET_CLASSNAMES  # takes seconds, and most evaluators do without

    names = list(IMAGENET_CLASSNAMES)
    return [
        f"{name} ({index})" if name in names[:index] else name for index, name in enumerate(names)
    ]


def check_label_maps(directory: Path) -> None:
    """Raise ModelError if a transformers directory's label2id contradicts its id2label."""
    file = directory / "config.json"
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
        names = {int(index): name for index, name in config["id2label"].items()}
        places = {name: int(index) for name, index in config["label2id"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # there are not both; what cannot be read is told when it is loaded
    for name, index in places.items():
        if names.get(index) != name:
            raise ModelError(
                f"{file}: label2id has {name!r} at output {index}, where id2label has "
                f"{names.get(index)!r}; correct the one that is wrong"
            )
