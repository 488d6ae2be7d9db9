"""What the page of a report shows of a single row: its accuracy matrix, samples, origin."""

from __future__ import annotations

import base64
import itertools
from dataclasses import dataclass
from pathlib import Path

from cu_runner.reporting.page_data import Samples, provenance, sample_images
from cu_runner.reporting.page_groups import Group
from cu_runner.reporting.page_plots import write_heat_map
from cu_runner.reporting.page_recovery import Recovery, recovery_of
from cu_runner.reporting.page_tables import MOST_COLUMNS, Part, part_of, parts_of
from cu_runner.store.layout import CONFIG
from cu_runner.store.run_record import RunRecord

PRINTED = (552, 940, 64)  # pixels of samples across and down a printed page, and of one at most


@dataclass(frozen=True)
class Pictures:
    """Sample images with one concept of the other domain.

    parts: rows below one another, and their images as JPEG in base64. side: pixels of one in print.
    """

    samples: Samples
    parts: list[tuple[Part, str]]
    side: int


@dataclass(frozen=True)
class Origin:
    """Where the numbers of a run are from. command: None if the Python interface made it."""

    seed: int
    facts: dict[str, str]
    command: str | None
    config: str


@dataclass(frozen=True)
class Details:
    """What is shown of a group beside its metrics.

    numbers: the mean over its seeds, in parts side by side. seeds: the same of single ones, with
    the seed. recovery: None without a probe that has measured. pictures: of the first seed.
    """

    group: Group
    numbers: list[Part]
    seeds: list[tuple[int, list[Part]]]
    recovery: Recovery | None
    pictures: list[Pictures]
    origins: list[Origin]


def details_of(group: Group, plots: Path, most: int) -> Details:
    """Return everything of a group, of at most so many of its seeds, and write its heat maps."""
    write_heat_map(group, plots)
    across = parts_of(group.last + 1, MOST_COLUMNS)
    rows, unlearned = range(len(group.accuracy)), group.unlearned.to_numpy()
    alone = zip(group.runs, group.accuracies, strict=True) if len(group.runs) > 1 else ()
    return Details(
        group,
        numbers=[part_of(group.accuracy, unlearned, rows, part) for part in across],
        seeds=[
            (run.seed, [part_of(accuracy, unlearned, rows, part) for part in across])
            for run, accuracy in itertools.islice(alone, most)
        ],
        recovery=recovery_of(group, plots, most),
        pictures=[
            pictures_of(group, samples)
            for samples in sample_images(group.first, list(map(str, group.accuracy.index)))
        ],
        origins=[origin_of(run) for run in group.runs[:most]],
    )


def pictures_of(group: Group, samples: Samples) -> Pictures:
    """Return samples in parts that fit a printed page."""
    side = min(PRINTED[2], PRINTED[0] // len(samples.requests))
    parts = []
    for rows in parts_of(len(group.accuracy), PRINTED[1] // side):
        jpeg = base64.b64encode(samples.jpeg(rows)).decode()
        shown = part_of(group.accuracy, group.unlearned.to_numpy(), rows, samples.requests)
        parts.append((shown, jpeg))
    return Pictures(samples, parts, side)


def origin_of(run: RunRecord) -> Origin:
    """Return where the numbers of a run are from."""
    facts = {"directory": within_here(run.directory), "signature": run.records[0].signature}
    if last := len(run.records) - 1:
        facts["weights"] = within_here(run.weights(last))
    text = (run.directory / CONFIG).read_text(encoding="utf-8")
    return Origin(run.seed, facts | provenance(run), run.command, text)


def within_here(path: Path) -> str:
    """Return a path as seen from the current directory, if it lies in it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
