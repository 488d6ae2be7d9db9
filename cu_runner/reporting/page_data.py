"""What a report shows of runs: their labels, drift by layer, sample images over time, costs, provenance. No drawing, no HTML.

Every file that is read here is checked: small ones by the sha256 that step.json names, weights by the drift that it names.
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
from safetensors import SafetensorError, safe_open

from cu_runner.evaluators.grid import read_grid
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.store.layout import GRID, PREDICTIONS, STEP
from cu_runner.store.run_record import RunRecord, read_run

NEEDED = (
    "name",
    "domain",
    "cross_domain",
    "retain",
    "seeds",
)  # of the sequence in a run's config.yaml, beside what read_run needs


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


SAME_DRIFT = 1e-6  # relative; the norms of the layers and the recorded drift are sums in float64, in another order


@dataclass(frozen=True)
class Shown:
    """A run of a report: its number (it decides colour, line style and marker) and its unique label."""

    number: int
    label: str
    run: RunRecord

    @property
    def title(self) -> str:
        """The label, with the number of finished requests when some are missing."""
        return self.label if self.run.complete else f"{self.label} ({self.extent} requests)"

    @property
    def extent(self) -> str:
        """ "12", or "7 of 12" for an unfinished run."""
        return (
            str(self.run.num_requests)
            if self.run.complete
            else f"{len(self.run.records) - 1} of {self.run.num_requests}"
        )

    @property
    def last(self) -> pd.Series:
        """The row of the last finished request."""
        return self.run.table.iloc[-1]

    @cached_property
    def accuracy(self) -> pd.DataFrame:
        """Percent recognised: rows concepts, columns requests from 0 on, NaN where not measured. Raises StoreError."""
        for index in range(len(self.run.records)):
            self.run.require(index, PREDICTIONS)
        return self.run.accuracy_matrix()

    @cached_property
    def unlearned(self) -> pd.DataFrame:
        """True where a cell of `accuracy` belongs to a concept that is unlearned by then."""
        since = np.array(
            [self.run.requested.get(concept, math.inf) for concept in self.accuracy.index]
        )
        return self.accuracy.notna() & (self.accuracy.columns.to_numpy()[None, :] >= since[:, None])


def read_all(directories: list[Path]) -> tuple[list[Shown], list[str]]:
    """The runs, labelled, and the names of those that have no finished step yet. Raises StoreError; also when none has one."""
    started = [
        directory for directory in directories if (directory / "steps" / "00" / STEP).exists()
    ]
    runs = [read_run(directory) for directory in started or directories]
    for run in runs:
        if missing := [name for name in NEEDED if name not in run.config["sequence"]]:
            raise StoreError(
                f"{run.directory}/config.yaml: sequence has no {', '.join(missing)}; restore the file"
            )
    shown = [
        Shown(number, label, run)
        for number, (label, run) in enumerate(zip(label_runs(runs), runs, strict=True))
    ]
    return shown, [directory.name for directory in directories if directory not in started]


def label_runs(runs: list[RunRecord]) -> list[str]:
    """Short unique names: method and regularizers; sequence and seed where they differ; signature, then number, where needed."""
    labels = [run.label for run in runs]
    if len({run.sequence for run in runs}) > 1:
        labels = [f"{label}, {run.sequence}" for label, run in zip(labels, runs, strict=True)]
    if len({run.seed for run in runs}) > 1:
        labels = [f"{label}, seed {run.seed}" for label, run in zip(labels, runs, strict=True)]
    for details in ([run.records[0]["signature"][:4] for run in runs], range(1, len(runs) + 1)):
        count = Counter(labels)
        labels = [
            f"{label} [{detail}]" if count[label] > 1 else label
            for label, detail in zip(labels, details, strict=True)
        ]
    return labels


def drift_by_layer(run: RunRecord) -> dict[str, float]:
    """L2 norm of theta_n - theta_base of each layer (weight and bias together) after the last finished request; {} before one.

    Raises:
        StoreError: the file cannot be read, or its norms do not add up to the recorded drift.
    """
    last = len(run.records) - 1
    if last == 0:
        return {}
    squares: dict[str, float] = {}
    try:
        with safe_open(run.weights(last), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, safe_open is no mapping
                layer = name.rpartition(".")[0] or name
                squares[layer] = (
                    squares.get(layer, 0.0) + file.get_tensor(name).double().square().sum().item()
                )
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{run.weights(last)}: cannot be read ({' '.join(str(error).split())}); restore it"
        ) from None
    if not math.isclose(
        math.sqrt(sum(squares.values())), run.records[last]["row"]["drift_l2"], rel_tol=SAME_DRIFT
    ):
        raise StoreError(
            f"{run.weights(last)}: does not have the drift that {STEP} names; restore it"
        )
    return {layer: math.sqrt(squares[layer]) for layer in sorted(squares, key=network_position)}


def network_position(layer: str) -> tuple[int, list[tuple[bool, int, str]]]:
    """Sort key: layers in the order in which a UNet applies them; within a block, each attention after its residual layers."""
    rank = next((rank for rank, block in enumerate(BLOCKS) if layer.startswith(block)), len(BLOCKS))
    turned = re.sub(
        r"\b(resnets|attentions)\.(\d+)",
        lambda found: f"{found[2]}.{found[1] == 'attentions':d}",
        layer,
    )
    return rank, [
        (not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in turned.split(".")
    ]


def short_layer(layer: str) -> str:
    """A layer's place for an axis: "up 1.0.0" of "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"."""
    return f"{layer.partition('_')[0]} {'.'.join(re.findall(r'(?<=[.])[0-9]+', layer))}".strip()


@dataclass(frozen=True)
class Samples:
    """Sample images over time without gaps, in the rows and columns of Shown.accuracy; white where there is none."""

    montage: Image.Image
    cell: int  # pixels a side of one
    cross_concept: str
    seed: int

    def jpeg(self, rows: range, columns: range) -> bytes:
        """A part of the montage."""
        box = tuple(
            self.cell * edge for edge in (columns.start, rows.start, columns.stop, rows.stop)
        )
        buffer = io.BytesIO()
        self.montage.crop(box).save(buffer, "JPEG", quality=88)
        return buffer.getvalue()


def sample_images(shown: Shown) -> Samples:
    """The first seed's image of every concept with the first cross concept, after every request. Raises StoreError."""
    run, rows = shown.run, list(shown.accuracy.index)
    sequence = run.config["sequence"]
    columns = range(len(run.records))
    cross_concept = run.predictions(0)[sequence["cross_domain"]][0]

    def pictures(index: int) -> dict[str, Image.Image]:
        run.require(index, GRID)
        predictions = run.predictions(index)
        concepts, crosses = (
            list(dict.fromkeys(predictions[sequence[name]])) for name in ("domain", "cross_domain")
        )
        grid = read_grid((run.step_dir(index) / GRID).read_bytes(), concepts, crosses)
        return {concept: grid[concept, cross_concept] for concept in concepts}

    cell = min(
        pictures(0)[rows[0]].width,
        LARGEST_CELL,
        max(1, math.isqrt(LARGEST_MONTAGE // (len(rows) * len(columns)))),
    )
    montage = Image.new("RGB", (cell * len(columns), cell * len(rows)), "white")
    for index in columns:
        for concept, picture in pictures(index).items():
            montage.paste(
                picture.resize((cell, cell), Image.Resampling.LANCZOS),
                (cell * index, cell * rows.index(concept)),
            )
    return Samples(montage, cell, cross_concept, sequence["seeds"][0])


def costs(runs: list[Shown]) -> pd.DataFrame:
    """One row per run: seconds and steps of all requests, peak memory (MB), devices, and requests whose weights were cached.

    The evaluation of the untouched model is shared by runs through the cache; its seconds are not counted.
    """
    rows = []
    for shown in runs:
        requests = shown.run.table.iloc[1:]
        row = {
            name: float(requests[name].sum())
            for name in ("train_seconds", "eval_seconds", "train_steps")
        }
        row["peak_memory_mb"] = float(shown.run.table["peak_memory_mb"].max())
        row["device"] = provenance(shown.run)["device"]
        row["cached"] = sum("cached" in record["training"] for record in shown.run.records)
        rows.append(row)
    return pd.DataFrame(rows)


def provenance(run: RunRecord) -> dict[str, str]:
    """What the numbers were made on, from the records of the steps; where steps differ, with their requests."""
    facts = {
        "device": [],
        "git commit": [],
        "versions": [],
        "model sha256": [],
        "evaluator sha256": [],
    }
    for record in run.records:
        facts["device"].append(record["device"])
        facts["git commit"].append(record["git_commit"] or "unknown (an installed package)")
        facts["versions"].append(
            ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        )
        facts["model sha256"].append(record["model_sha256"])
        facts["evaluator sha256"].append(record["evaluator_sha256"])
    return {name: spans(values) for name, values in facts.items()}


def spans(values: list[str]) -> str:
    """ "a" if all are equal, else "a (requests 0 to 3), b (request 4)"."""
    parts, start = [], 0
    for value, group in groupby(values):
        end = start + len(list(group)) - 1
        parts.append((value, f"request {start}" if start == end else f"requests {start} to {end}"))
        start = end + 1
    return (
        values[0]
        if len(parts) == 1
        else ", ".join(f"{value} ({requests})" for value, requests in parts)
    )
