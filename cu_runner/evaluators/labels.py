"""The labels of a network's outputs, in the order of the outputs."""

from __future__ import annotations

from cu_runner.concepts.entries import read_entries

IMAGENET = "imagenet"  # the 1000 classes in their usual order, as open_clip spells them


def read_labels(key: str, source: str | list[str]) -> list[str]:
    """The labels themselves, those of a shipped list (cu_runner/concepts/lists), of a text file with one a line, or "imagenet".

    Raises:
        ValueError: there is no such list or file, a label is there twice, or fewer than two are.
    """
    labels = imagenet_classes() if source == IMAGENET else read_entries(key, source)
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"{key}: {repeated[0]} stands for two outputs; labels must differ")
    if len(labels) < 2:
        raise ValueError(f"{key}: {len(labels)} labels; two are the least that can be told apart")
    return labels


def imagenet_classes() -> list[str]:
    """The 1000 names of open_clip; of two with one name (missile, sunglasses) the second has its number behind it."""
    from open_clip import IMAGENET_CLASSNAMES  # takes seconds, and most evaluators do without

    names = list(IMAGENET_CLASSNAMES)
    return [
        f"{name} ({index})" if name in names[:index] else name for index, name in enumerate(names)
    ]
