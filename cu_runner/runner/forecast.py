"""What a run would do, before it does anything: requests, steps, images, time, disk. dry_run=true.

Time is never guessed: it comes from step.json of earlier runs of the same model on the same device
with as many threads, or it is said to be unknown.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors

from cu_runner.concepts.requests import Request
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.models.architectures import ARCHITECTURES
from cu_runner.models.checkpoint_files import HUB_ID, find_weights, locate
from cu_runner.models.parameters import belongs
from cu_runner.models.transformer_files import denoiser_in, locate_shared
from cu_runner.recovery.base import Cost, cost_of
from cu_runner.runner.own_images import check_pictured, describe_folders, picture_folders
from cu_runner.runner.probing import build_probes
from cu_runner.runtime.devices import choose_device, device_name
from cu_runner.schema.errors import ModelError, StoreError
from cu_runner.schema.settings import EvalSettings, ParameterGroup
from cu_runner.schema.values import ConfigTree, numbers_by_value, without_paths
from cu_runner.store.run_directory import refuse_other_code
from cu_runner.store.run_record import RunRecord, read_run
from cu_runner.store.signature import NOT_SCIENTIFIC

SIMILAR_RUNS = 20  # so many of the newest runs that give a rate are enough for it
# what reading a run raises that is damaged, or of another version
UNREADABLE = (StoreError, OSError, ValueError, KeyError, TypeError, ZeroDivisionError)


@dataclass(frozen=True)
class Work:
    """What one step of a run is: request 0 is the evaluation of the untouched model."""

    request: int
    concept: str
    start: str
    train_steps: int
    images: int


@dataclass(frozen=True)
class Rates:
    """Seconds per training step and per image, medians over the requests of earlier runs.

    None where there are none. num_runs: how many runs gave one of them.
    """

    step: float | None
    image: float | None
    num_runs: int


def forecast(plan: RunConfig) -> str:
    """Return the text that `cu-run dry_run=true` prints.

    Raises:
        ValueError, StoreError: what the run itself would refuse.
    """
    method = plan.method.build()  # which refuses settings that do not go together, as those below
    pictured = plan.sequence.build()
    check_pictured(plan.method_name, method, pictured)
    for regularizer in plan.regularizers.values():
        regularizer.build()
    device, work, spine = device_name(choose_device(plan.spine)), work_of(plan), plan.spine
    begun = read_run(plan.directory) if (plan.directory / "steps/00/step.json").exists() else None
    if begun is not None and not spine.allow_other_code:
        refuse_other_code(begun.directory, plan.code, begun.codes)
    done = 0 if begun is None else len(begun.records)
    sequence, regularizers = plan.sequence.arguments["name"], "+".join(plan.regularizers)
    lines = [
        f"plan: {sequence}, method {plan.method_name}, reg {regularizers or 'none'}, "
        f"{plan.setting.plan}",
        *(f"note: {note}" for note in plan.notes),
        *work_lines(work, done),
        *describe_folders(picture_folders(plan, pictured)),
    ]
    if not (left := work[done:]):
        return "\n".join([*lines, f"nothing to do: {plan.directory} is complete"])
    num_steps = sum(entry.train_steps for entry in left)
    num_images = sum(entry.images for entry in left)
    evaluations = sum(spine.eval.is_due(each.request, len(work) - 1) for each in left)
    retained = evaluations * retained_images(plan)
    most = "at most " if plan.setting.ends_early else ""
    lines.append(
        f"to do: {evaluations} of {len(work)} evaluations, {most}{num_steps} training steps of "
        f"batch {spine.train.batch_size}, {num_images} images "
        f"({spine.eval.steps} denoising steps, guidance {spine.eval.guidance:g})"
    )
    if retained:
        lines.append(f"retention: {retained} further images, of general prompts")
    probing = probes_left(plan, done)
    if plan.probes:
        lines.append(
            f"recovery: at most {probing.images} further images and {probing.steps} steps of "
            "training and search, by the probes; controls are cached across runs, and the time "
            "of these steps is not in the estimate"
        )
    rates = measure_rates(plan, device)
    time = time_left(num_steps, num_images + retained + probing.images, rates, device, most)
    place = plan.model.arguments
    revision, shared = (
        None if place.get(key) is None else str(place[key]) for key in ("revision", "shared")
    )
    weights = delta_bytes(str(place["path"]), revision, method.params, shared)
    size = "unknown size"
    if weights is not None:
        size = f"{disk_copies(plan, left) * weights / 1e6:.1f} MB"
    free = shutil.disk_usage(existing_parent(plan.directory)).free / 1e9
    lines += [
        f"time: {time}",
        f"disk: {size} of weights at most, cache and checkpoint included; tables and pictures "
        f"besides; {free:.1f} GB are free",
        f"run: {plan.directory} (not touched)",
    ]
    return "\n".join(lines)


def work_lines(work: list[Work], done: int) -> list[str]:
    """Return a line for every step, of which so many are done."""
    width = max(len(entry.concept) for entry in work)
    lines = []
    for entry in work:
        state = f"from the {entry.start} weights" if entry.start else ""
        steps = f"{entry.train_steps:>6} steps" if entry.train_steps else " " * 12
        line = f"{entry.request:>4}  {entry.concept:<{width}}  {steps}  {entry.images:>6} images  "
        lines.append((line + ("done" if entry.request < done else state)).rstrip())
    return lines


def work_of(plan: RunConfig) -> list[Work]:
    """Return what every step of a run is."""
    sequence = plan.sequence.build()
    requests = plan.requests(sequence)
    steps = 0 if plan.method.build().closed_form else plan.spine.train.steps
    gated = any(node.made.has_weights for node in plan.regularizers.values())
    return plan_work(sequence, requests, steps, plan.merges, gated, plan.spine.eval)


def plan_work(
    sequence: Sequence,
    requests: list[Request],
    train_steps: int,
    merging: bool,
    gated: bool = False,
    evaluated: EvalSettings | None = None,
) -> list[Work]:
    """Return training steps and evaluation images of every step.

    Args:
        sequence: what is measured.
        requests: what is trained.
        train_steps: of one request, at most.
        merging: whether every concept so far is measured, though each request unlearns one.
        gated: whether the images of what the request left alone are those of the step before.
        evaluated: after which requests images are made; None is after every one.
    """
    last = len(requests)

    def count(concepts: Iterable[Concept]) -> int:
        return sum(map(sequence.num_images, concepts))

    retained, so_far = count(sequence.retained), 0
    work = [Work(0, "untouched model", "", 0, count(sequence.targets) + retained)]
    for request in requests:
        added = count(request.listed if request.is_only else [request.listed[request.index - 1]])
        so_far += added
        measured = added if request.plan == "independent" and not merging else so_far
        before, due = (
            evaluated is None or evaluated.is_due(index, last)
            for index in (request.index - 1, request.index)
        )
        kept = gated and before and request.plan == "sequential"
        images = (added if kept else retained + measured) if due else 0
        work.append(Work(request.index, request.label, request.start, train_steps, images))
    return work


def retained_images(plan: RunConfig) -> int:
    """Return how many images of general prompts the retention makes at every step."""
    return plan.retention.build().num_images if plan.retention else 0


def probes_left(plan: RunConfig, done: int) -> Cost:
    """Return what the probes of recovery make in the steps after the first `done` ones."""
    sequence = plan.sequence.build()
    requests = plan.requests(sequence)
    erased = plan.unlearned(requests)
    return cost_of(build_probes(plan, sequence), erased, sequence, max(done - 1, 0))


def disk_copies(plan: RunConfig, work: list[Work]) -> int:
    """Return how many times the trained weights are on the disk at most, by the end of these steps.

    Every request keeps its delta, a merging one the merged weights too; what starts from the base
    model is in the cache besides. The checkpoint of a request in training holds the optimiser's
    moments as well, and is written beside the one that it replaces.
    """
    requests = [entry for entry in work if entry.request]
    kept = sum(1 + plan.merges + (entry.start == "base") for entry in requests)
    if not requests or plan.spine.train.save_every is None:
        return kept
    moments = 0 if plan.spine.train.optimizer == "sgd" else 2
    return kept + 2 * (1 + moments)


def comparable(resolved: ConfigTree) -> ConfigTree:
    """Return what each rate depends on, without settings of no experiment but the threads."""
    science = numbers_by_value(without_paths(resolved, NOT_SCIENTIFIC))
    return {
        "machine": [science["model"], resolved["num_threads"]],
        "step": [science["method"], science["reg"], science["train"]["batch_size"]],
        "image": science["eval"],
        "retention": science.get("retention"),
    }


def measure_rates(plan: RunConfig, device: str) -> Rates:
    """Return the rates of earlier runs under these outputs, of this model, device and threads.

    Of a step: also with the same method, regularizers and batch. Of an image: with the same
    sampler, and with the planned retention or none. A run that is damaged, or of a version with
    other settings, gives no rate.
    """
    planned, general = comparable(plan.resolved), retained_images(plan)
    steps: dict[Path, list[float]] = {}  # of the runs that gave any
    images: dict[Path, list[float]] = {}
    found = (Path(plan.spine.paths.outputs) / "runs").glob("*/*/config.yaml")
    newest = sorted((path.parent for path in found), key=lambda path: -path.stat().st_mtime)
    for directory in newest:
        if min(len(steps), len(images)) >= SIMILAR_RUNS:
            break
        try:
            run = read_run(directory)
            own = comparable(run.config)
            if own["machine"] != planned["machine"] or run.records[0].device != device:
                continue
            if len(steps) < SIMILAR_RUNS and own["step"] == planned["step"]:
                steps |= {directory: seconds} if (seconds := seconds_per_step(run)) else {}
            same = own["image"] == planned["image"]
            same = same and own["retention"] in (None, planned["retention"])
            if len(images) < SIMILAR_RUNS and same:
                seconds = seconds_per_image(run, general if own["retention"] else 0)
                images |= {directory: seconds} if seconds else {}
        except UNREADABLE:
            continue
    return Rates(median(steps), median(images), len(steps | images))


def median(seconds: dict[Path, list[float]]) -> float | None:
    """Return the median over all requests of all runs."""
    values = [value for own in seconds.values() for value in own]
    return statistics.median(values) if values else None


def seconds_per_step(run: RunRecord) -> list[float]:
    """Return those of every request that was trained and not taken from the cache."""
    trained = [record.row for record in run.records[1:] if not record.training.cached]
    return [row.train_seconds / row.train_steps for row in trained if row.train_steps]


def seconds_per_image(run: RunRecord, general: int) -> list[float]:
    """Return those of every request; none with gates, which draw but some of their images.

    general: images of general prompts, whose time is in that of the evaluation.
    """
    return [
        record.row.eval_seconds / (len(run.predictions(record.index)) + general)
        for record in run.records[1:]
        if record.evaluated and "gate" not in run.config["reg"]
    ]


def delta_bytes(
    path: str, revision: str | None, group: ParameterGroup, shared: str | None = None
) -> int | None:
    """Return the size of the weights that a method trains, from headers of safetensors files.

    None where there are no such headers: a repository of the hub that is not on this machine has
    none yet. Of the parts that another directory shares none is trained.

    Raises:
        ModelError: the path is not there, or that of the shared parts.
    """
    if shared is not None and not HUB_ID.fullmatch(shared):
        locate_shared(shared)
    try:
        root = locate(path, revision, download=False)
    except ModelError:
        if HUB_ID.fullmatch(path):
            return None
        raise
    kind = "UNet2DConditionModel"
    if root.is_file():
        paths, prefix = [root], "model.diffusion_model."
    else:
        kind, folder = denoiser_in(root)
        weights = find_weights(folder)
        paths, prefix = (weights.paths if weights else []), ""
    if not paths or paths[0].suffix != ".safetensors":
        return None
    total, roles = 0, ARCHITECTURES[kind].roles
    for file in paths:
        with safetensors.safe_open(file, framework="np") as content:
            for name in content.keys():  # noqa: SIM118, safe_open is no mapping
                if name.startswith(prefix) and belongs(name, group, roles):
                    total += 4 * math.prod(content.get_slice(name).get_shape())
    return total


def time_left(num_steps: int, num_images: int, rates: Rates, device: str, most: str) -> str:
    """Return the estimate in words, or why there is none."""
    if rates.image is None or (num_steps and rates.step is None):
        lacking = "training with this method, these regularizers and this batch"
        lacking = "evaluation" if rates.image is None else lacking
        return (
            f"unknown: no earlier run under outputs measured {lacking} of this model on {device} "
            "with these threads"
        )
    training, evaluation = num_steps * (rates.step or 0.0), num_images * rates.image
    further = "start-up, anchor images and what ends requests early"
    further = further if most else "start-up and anchor images"
    return (
        f"{most}about {(training + evaluation) / 60:.1f} min on {device}: "
        f"training {training:.0f} s, evaluation {evaluation:.0f} s "
        f"(rates measured in {rates.num_runs} earlier runs; {further} come on top)"
    )


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
