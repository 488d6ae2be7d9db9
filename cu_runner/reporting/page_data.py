"""What a report shows of runs: labels, drift by layer, sample images over time, costs, provenance.

No drawing, no HTML. Every file that is read here is checked: small ones by the sha256 that
step.json names, weights by the drift that it names.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from cu_runner.evaluators.grid import read_grid
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.schema.values import ConfigTree, numbers_by_value, without_paths
from cu_runner.store.files import squared_norms
from cu_runner.store.layout import GRID, PREDICTIONS, STEP
from cu_runner.store.proof import ROUNDING, require_true
from cu_runner.store.run_record import RunRecord, read_run
from cu_runner.store.signature import NOT_SCIENTIFIC

# of the sequence in a run's config.yaml, beside what read_run needs
NEEDED = ("name", "domain", "cross_domain", "retain", "seeds")
LARGEST_CELL = 96  # pixels a side of a sample image in a report
LARGEST_MONTAGE = 8_000_000  # pixels of all sample images of a run together
BLOCKS = (
    "conv_in",
    "time_",
    "add_",
    "class_",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_norm_out",
    "conv_out",
)
WORDS = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


@dataclass(frozen=True)
class Shown:
    """A run of a report: its number (it decides colour, dashes and marker) and its unique label."""

    number: int
    label: str
    run: RunRecord

    @property
    def title(self) -> str:
        """Return the label, with the number of finished requests when some are missing."""
        return self.label if self.run.complete else f"{self.label} ({self.extent} requests)"

    @property
    def extent(self) -> str:
        """Return "12", or "7 of 12" for an unfinished run."""
        whole = str(self.run.num_requests)
        return whole if self.run.complete else f"{len(self.run.records) - 1} of {whole}"

    @property
    def last(self) -> pd.Series:
        """Return the row of the last finished request."""
        return self.run.table.iloc[-1]

    @cached_property
    def accuracy(self) -> pd.DataFrame:
        """Return percent recognised: rows concepts, columns requests from 0 on; NaN: not measured.

        Raises:
            StoreError: predictions of a step are damaged.
        """
        for index in range(len(self.run.records)):
            self.run.require(index, PREDICTIONS)
        return self.run.accuracy_matrix()

    @cached_property
    def unlearned(self) -> pd.DataFrame:
        """Return True where a cell of `accuracy` is of a concept that is unlearned by then."""
        first = [self.run.requested.get(concept, math.inf) for concept in self.accuracy.index]
        gone = self.accuracy.columns.to_numpy()[None, :] >= np.array(first)[:, None]
        return self.accuracy.notna() & gone


def read_all(directories: list[Path]) -> tuple[list[Shown], list[str]]:
    """Return the runs, labelled, and the names of those that have no finished step yet.

    Raises:
        StoreError: a run is damaged, or no run has a finished step.
    """
    started = [
        directory for directory in directories if (directory / "steps" / "00" / STEP).exists()
    ]
    runs = [read_run(directory) for directory in started or directories]
    for run in runs:
        if missing := [name for name in NEEDED if name not in run.config["sequence"]]:
            what = f"sequence has no {', '.join(missing)}; restore the file"
            raise StoreError(f"{run.directory}/config.yaml: {what}")
        require_true(run)
    labels = label_runs(runs)
    shown = [Shown(number, labels[number], run) for number, run in enumerate(runs)]
    return shown, [directory.name for directory in directories if directory not in started]


def label_runs(runs: list[RunRecord]) -> list[str]:
    """Return short unique names: method and regularizers, and what else is needed.

    That is the sequence and the seed where they differ, then the signature, then a number.
    """
    labels = [run.label for run in runs]
    if len({run.sequence for run in runs}) > 1:
        labels = [f"{label}, {run.sequence}" for label, run in zip(labels, runs, strict=True)]
    if len({run.seed for run in runs}) > 1:
        labels = [f"{label}, seed {run.seed}" for label, run in zip(labels, runs, strict=True)]
    signatures = [run.records[0].signature[:4] for run in runs]
    for details in (signatures, range(1, len(runs) + 1)):
        count = Counter(labels)
        labels = [
            f"{label} [{detail}]" if count[label] > 1 else label
            for label, detail in zip(labels, details, strict=True)
        ]
    return labels


def contrast(runs: list[RunRecord]) -> dict[str, list[object]]:
    """Return the settings of an experiment in which runs are not all alike.

    Returns:
        By dotted key the value of each run; None where it has none.
    """
    settings = [leaves(without_paths(run.config, NOT_SCIENTIFIC)) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = {key: [each.get(key) for each in settings] for key in keys}
    return {
        key: values for key, values in rows.items() if any(value != values[0] for value in values)
    }


def leaves(value: ConfigTree, path: str = "") -> ConfigTree:
    """Return settings by dotted key. A list is one, and so is a mapping whose keys are no words."""
    found: ConfigTree = {}
    for key, entry in value.items():
        place = f"{path}.{key}" if path else str(key)
        if isinstance(entry, dict) and entry and all(WORDS.fullmatch(str(name)) for name in entry):
            found |= leaves(entry, place)
        elif entry != {}:
            found[place] = numbers_by_value(entry) if isinstance(entry, list | dict) else entry
    return found


def drift_by_layer(run: RunRecord) -> dict[str, float]:
    """Return the L2 norm of theta_n - theta_base of each layer after the last finished request.

    Weight and bias of a layer together; {} before a request.

    Raises:
        StoreError: the file cannot be read, or its norms do not add up to the recorded drift.
    """
    last = len(run.records) - 1
    if last == 0:
        return {}
    squares: dict[str, float] = {}
    for name, square in squared_norms(run.weights(last)).items():
        layer = name.rpartition(".")[0] or name
        squares[layer] = squares.get(layer, 0.0) + square
    whole = math.sqrt(math.fsum(squares.values()))
    if not math.isclose(whole, run.records[last].row.drift_l2, rel_tol=ROUNDING):
        raise StoreError(
            f"{run.weights(last)}: does not have the drift that {STEP} names; restore it"
        )
    return {layer: math.sqrt(squares[layer]) for layer in sorted(squares, key=network_position)}


def network_position(layer: str) -> tuple[int, list[tuple[bool, int, str]]]:
    """Return a sort key: layers in the order in which a UNet applies them.

    Within a block, each attention stands after its residual layers.
    """
    rank = next((rank for rank, block in enumerate(BLOCKS) if layer.startswith(block)), len(BLOCKS))
    turned = re.sub(r"\bresnets\.(\d+)", r"\1.0", layer)
    parts = re.sub(r"\battentions\.(\d+)", r"\1.1", turned).split(".")
    return rank, [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def short_layer(layer: str) -> str:
    """Return a layer's place for an axis.

    "up 1.0.0" of "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k".
    """
    places = re.findall(r"(?<=[.])[0-9]+", layer)
    return f"{layer.partition('_')[0]} {'.'.join(places)}".strip()


@dataclass(frozen=True)
class Samples:
    """Sample images over time without gaps, in the rows and columns of Shown.accuracy.

    White where there is none.
    """

    montage: Image.Image
    cell: int  # pixels a side of one
    cross_concept: str
    seed: int

    def jpeg(self, rows: range, columns: range) -> bytes:
        """Return a part of the montage."""
        left, top = self.cell * columns.start, self.cell * rows.start
        right, bottom = self.cell * columns.stop, self.cell * rows.stop
        buffer = io.BytesIO()
        self.montage.crop((left, top, right, bottom)).save(buffer, "JPEG", quality=88)
        return buffer.getvalue()


def sample_images(shown: Shown) -> Samples:
    """Return the first seed's image of every concept, after every request.

    It is the one with the first cross concept.

    Raises:
        StoreError: a file of a step is damaged.
    """
    run, rows = shown.run, list(shown.accuracy.index)
    sequence = run.config["sequence"]
    columns = range(len(run.records))
    cross_concept = str(run.predictions(0)[sequence["cross_domain"]][0])

    def pictures(index: int) -> dict[str, Image.Image]:
        run.require(index, GRID)
        predictions = run.predictions(index)
        concepts, crosses = (
            list(dict.fromkeys(map(str, predictions[sequence[name]])))
            for name in ("domain", "cross_domain")
        )
        grid = read_grid((run.step_dir(index) / GRID).read_bytes(), concepts, crosses)
        return {concept: grid[concept, cross_concept] for concept in concepts}

    roomy = max(1, math.isqrt(LARGEST_MONTAGE // (len(rows) * len(columns))))
    cell = min(pictures(0)[rows[0]].width, LARGEST_CELL, roomy)
    montage = Image.new("RGB", (cell * len(columns), cell * len(rows)), "white")
    for index in columns:
        for concept, picture in pictures(index).items():
            small = picture.resize((cell, cell), Image.Resampling.LANCZOS)
            montage.paste(small, (cell * index, cell * rows.index(concept)))
    return Samples(montage, cell, cross_concept, sequence["seeds"][0])


@dataclass(frozen=True)
class Cost:
    """What all finished requests of a run took. cached: requests whose weights were in the cache.

    The evaluation of the untouched model is shared by runs through the cache; its seconds are not
    counted.
    """

    train_seconds: float
    eval_seconds: float
    train_steps: int
    peak_memory_mb: float
    device: str
    cached: int


def costs(runs: list[Shown]) -> pd.DataFrame:
    """Return a row (Cost) per run."""
    rows = []
    for shown in runs:
        requests = shown.run.table.iloc[1:]
        cost = Cost(
            train_seconds=float(requests["train_seconds"].sum()),
            eval_seconds=float(requests["eval_seconds"].sum()),
            train_steps=int(requests["train_steps"].sum()),
            peak_memory_mb=float(shown.run.table["peak_memory_mb"].max()),
            device=provenance(shown.run)["device"],
            cached=sum(record.training.cached for record in shown.run.records),
        )
        rows.append(cost)
    return pd.DataFrame(rows)


def provenance(run: RunRecord) -> dict[str, str]:
    """Return what the numbers were made on; where steps differ, with their requests."""
    records, unknown = run.records, "unknown (an installed package)"
    facts = {
        "device": [record.device for record in records],
        "git commit": [record.git_commit or unknown for record in records],
        "versions": [
            ", ".join(f"{name} {each}" for name, each in record.versions.items())
            for record in records
        ],
        "model sha256": [record.model_sha256 for record in records],
        "evaluator sha256": [record.evaluator_sha256 for record in records],
        "code sha256": [
            record.code.sha256 + (" (with uncommitted changes)" if record.code.dirty else "")
            for record in records
        ],
    }
    return {name: spans(values) for name, values in facts.items()}


def spans(values: list[str]) -> str:
    """Return "a" if all are equal, else "a (requests 0 to 3), b (request 4)"."""
    parts, start = [], 0
    for value, group in groupby(values):
        end = start + len(list(group)) - 1
        parts.append((value, f"request {start}" if start == end else f"requests {start} to {end}"))
        start = end + 1
    if len(parts) == 1:
        return values[0]
    return ", ".join(f"{value} ({requests})" for value, requests in parts)
