"""What a report shows of runs: drift by layer, sample images over time, costs, provenance.

No drawing, no HTML. Every file that is read here is checked: small ones by the sha256 that
step.json names, weights by the drift that it names.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from itertools import groupby

from PIL import Image

from cu_runner.evaluators.grid import read_grid
from cu_runner.evaluators.metrics import shown_in
from cu_runner.reporting.estimates import Estimate, of_sizes
from cu_runner.reporting.page_groups import Group
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.store.files import squared_norms
from cu_runner.store.layout import GRID, STEP
from cu_runner.store.proof import ROUNDING
from cu_runner.store.run_record import RunRecord

LARGEST_CELL = 128  # pixels a side of a sample image in a report
LARGEST_MONTAGE = 8_000_000  # pixels of all sample images of a run together
MOST_CROSSES = 3  # concepts of the other domain, with each of which samples are shown
MOST_SAMPLED = 8  # requests of which samples are shown: what fits a page at a visible size
SUMMED = ("train_seconds", "eval_seconds", "train_steps")
BLOCKS = (
    "conv_in",
    "time_",
    "add_",
    "class_",
    "context_embedder",
    "caption_projection",
    "transformer_blocks",
    "single_transformer_blocks",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_norm_out",
    "conv_out",
)


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


def drift_estimates(group: Group) -> dict[str, Estimate]:
    """Return drift_by_layer(), of several seeds its mean and interval."""
    drifts = [drift_by_layer(run) for run in group.runs]
    return {layer: of_sizes([drift[layer] for drift in drifts]) for layer in drifts[0]}


def network_position(layer: str) -> tuple[int, list[tuple[bool, int, str]]]:
    """Return a sort key: layers in the order in which a denoiser applies them.

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
    """Images of every concept with one concept of the other domain, and one seed.

    montage: without gaps; rows are those of Group.accuracy, columns some of the requests. White
    where there is no image.
    """

    cross_concept: str
    seed: int
    requests: list[int]
    montage: Image.Image
    cell: int  # pixels a side of an image

    def jpeg(self, rows: range) -> bytes:
        """Return some rows of the montage."""
        box = (0, self.cell * rows.start, self.montage.width, self.cell * rows.stop)
        buffer = io.BytesIO()
        self.montage.crop(box).save(buffer, "JPEG", quality=88)
        return buffer.getvalue()


def sample_images(run: RunRecord, concepts: list[str]) -> list[Samples]:
    """Return the first seed's images of the concepts, with the first ones of the other domain.

    Raises:
        StoreError: a file of a step is damaged.
    """
    sequence = run.config["sequence"]
    lists = next(iter(sequence.get("domains", {"": sequence}).values()))
    evaluated = [index for index, record in enumerate(run.records) if record.evaluated]
    requests = [evaluated[place] for place in spread(len(evaluated), MOST_SAMPLED)]
    grids = {index: images_of(run, index) for index in requests}
    crosses = []
    for part in run.measured:
        own = {*part.targets, *part.retain}
        shown = dict.fromkeys(cross for concept, cross in grids[0] if concept in own)
        crosses += list(shown)[:MOST_CROSSES]
    count = len(concepts) * len(requests) * len(crosses)
    roomy = max(1, math.isqrt(LARGEST_MONTAGE // count))
    cell = min(next(iter(grids[0].values())).width, LARGEST_CELL, roomy)
    found = []
    for cross in crosses:
        montage = Image.new("RGB", (cell * len(requests), cell * len(concepts)), "white")
        for column, index in enumerate(requests):
            for row, concept in enumerate(concepts):
                if (picture := grids[index].get((concept, cross))) is not None:
                    small = picture.resize((cell, cell), Image.Resampling.LANCZOS)
                    montage.paste(small, (cell * column, cell * row))
        found.append(Samples(cross, lists["seeds"][0], requests, montage, cell))
    return found


def images_of(run: RunRecord, index: int) -> dict[tuple[str, str], Image.Image]:
    """Return the images of a step's grid by concept and concept of the other domain."""
    run.require(index, GRID)
    shown = shown_in(run.predictions(index), run.measured)
    concepts, crosses = (list(dict.fromkeys(map(str, names))) for names in shown)
    return read_grid((run.step_dir(index) / GRID).read_bytes(), concepts, crosses)


def spread(count: int, most: int) -> list[int]:
    """Return at most so many of the numbers from 0 to count - 1, evenly, with both ends."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


@dataclass(frozen=True)
class Cost:
    """What all finished requests of a run took; of several seeds the mean, of memory the peak.

    cached: requests whose weights were in the cache. The evaluation of the untouched model is
    shared by runs through the cache; its seconds are not counted.
    """

    train_seconds: float
    eval_seconds: float
    train_steps: float
    peak_memory_mb: float
    device: str
    cached: int


def costs(groups: list[Group]) -> pd.DataFrame:
    """Return a row (Cost) per group."""
    rows = []
    for group in groups:
        tables = [run.table for run in group.runs]
        sums = pd.DataFrame([table.iloc[1:][list(SUMMED)].sum() for table in tables]).mean()
        cost = Cost(
            train_seconds=float(sums["train_seconds"]),
            eval_seconds=float(sums["eval_seconds"]),
            train_steps=float(sums["train_steps"]),
            peak_memory_mb=float(max(table["peak_memory_mb"].max() for table in tables)),
            device="; ".join(dict.fromkeys(provenance(run)["device"] for run in group.runs)),
            cached=sum(record.training.cached for run in group.runs for record in run.records),
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
