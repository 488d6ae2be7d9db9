"""What a run would do, before it does anything: requests, training steps, images, time from measured rates, disk. dry_run=true.

Time is never guessed: it comes from step.json of earlier runs of the same model on the same device with as many threads, or it is
said to be unknown.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors

from cu_runner.concepts.requests import Request, plan_requests
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.models.checkpoint_files import HUB_ID, find_weights, locate
from cu_runner.models.parameters import belongs
from cu_runner.runtime.devices import choose_device, device_name
from cu_runner.runtime.lazy import torch
from cu_runner.schema.errors import ModelError, StoreError
from cu_runner.schema.values import ConfigTree, numbers_by_value, without_paths
from cu_runner.store.run_directory import refuse_other_code
from cu_runner.store.run_record import RunRecord, find_runs, read_run
from cu_runner.store.signature import NOT_SCIENTIFIC

SIMILAR_RUNS = 20  # so many of the newest runs that give a rate are enough for it


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
    """Seconds per training step and per image, medians over the requests of earlier runs; None where there are none.

    num_runs: how many runs gave one of them.
    """

    step: float | None
    image: float | None
    num_runs: int


def merges(plan: RunConfig) -> bool:
    """Whether a regularizer merges: two files of weights per request then, and every concept so far is measured."""
    return any(node.build().independent_starts for node in plan.regularizers.values())


def work_of(plan: RunConfig) -> list[Work]:
    """What every step of a run is."""
    sequence, steps = (
        plan.sequence.build(),
        0 if plan.method.build().closed_form else plan.spine.train.steps,
    )
    return plan_work(
        sequence,
        plan_requests(sequence, plan.setting.plan, plan.setting.last_only),
        steps,
        merges(plan),
    )


def plan_work(
    sequence: Sequence, requests: list[Request], train_steps: int, merging: bool
) -> list[Work]:
    """Training steps and evaluation images of every step.

    Args:
        train_steps: of one request, at most.
        merging: whether every concept so far is measured, though each request unlearns one.
    """

    def count(unlearned: Iterable[Concept]) -> int:
        return len(sequence.evaluation_images([*unlearned, *sequence.retain]))

    work = [Work(0, "untouched model", "", 0, count(sequence.targets))]
    for request in requests:
        unlearned = (
            [each.targets[-1] for each in requests[: request.index]] if merging else request.erased
        )
        work.append(
            Work(request.index, request.label, request.start, train_steps, count(unlearned))
        )
    return work


def retained_images(plan: RunConfig) -> int:
    """Images of general prompts that the retention makes at every step."""
    return plan.retention.build().num_images if plan.retention else 0


def disk_copies(plan: RunConfig, work: list[Work]) -> int:
    """How many times the trained weights are on the disk at most, by the end of these steps.

    Every request keeps its delta, a merging one the merged weights too; what starts from the base model is in the cache besides.
    The checkpoint of a request in training holds the optimiser's moments as well, and is written beside the one that it replaces.
    """
    requests = [entry for entry in work if entry.request]
    kept = sum(1 + merges(plan) + (entry.start == "base") for entry in requests)
    moments = 0 if plan.spine.train.optimizer == "sgd" else 2
    return kept + (2 * (1 + moments) if requests and plan.spine.train.save_every is not None else 0)


def measure_rates(plan: RunConfig, device: str) -> Rates:
    """Rates of earlier runs under the same outputs, with the same model, device and threads.

    Of a step: also with the same method, regularizers and batch. Of an image: with the same sampler, and with the planned retention
    or none. A run that is damaged, or of a version with other settings, gives no rate.
    """
    root = Path(plan.spine.paths.outputs) / "runs"
    directories = find_runs([root]) if root.is_dir() and any(root.glob("*/*/config.yaml")) else []
    planned, general = comparable(plan.resolved), retained_images(plan)
    steps: dict[Path, list[float]] = {}  # of the runs that gave any
    images: dict[Path, list[float]] = {}
    for directory in sorted(directories, key=lambda path: path.stat().st_mtime, reverse=True):
        if min(len(steps), len(images)) >= SIMILAR_RUNS:
            break
        try:
            run = read_run(directory)
            found = comparable(run.config)
            if found["machine"] != planned["machine"] or run.records[0]["device"] != device:
                continue
            if len(steps) < SIMILAR_RUNS and found["step"] == planned["step"]:
                steps |= {directory: own} if (own := seconds_per_step(run)) else {}
            same_images = found["image"] == planned["image"] and found["retention"] in (
                None,
                planned["retention"],
            )
            if len(images) < SIMILAR_RUNS and same_images:
                own = seconds_per_image(run, general if found["retention"] else 0)
                images |= {directory: own} if own else {}
        except (
            StoreError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            ZeroDivisionError,
        ):  # damaged, or of another version
            continue
    medians = (
        statistics.median([value for own in rate.values() for value in own]) if rate else None
        for rate in (steps, images)
    )
    return Rates(*medians, len(steps | images))


def comparable(resolved: ConfigTree) -> ConfigTree:
    """What of a configuration each rate depends on, without settings that are no part of an experiment, but for the threads."""
    science = numbers_by_value(without_paths(resolved, NOT_SCIENTIFIC))
    return {
        "machine": [science["model"], resolved.get("num_threads")],
        "step": [science["method"], science["reg"], science["train"]["batch_size"]],
        "image": science["eval"],
        "retention": science.get("retention"),
    }


def seconds_per_step(run: RunRecord) -> list[float]:
    """Of every request that was trained and not taken from the cache."""
    rows = [record["row"] for record in run.records[1:] if not record["training"].get("cached")]
    return [row["train_seconds"] / row["train_steps"] for row in rows if row["train_steps"]]


def seconds_per_image(run: RunRecord, general: int) -> list[float]:
    """Of every request. general: images of general prompts, whose time is in that of the evaluation."""
    rows = [record["row"] for record in run.records]
    return [
        rows[index]["eval_seconds"] / (len(run.predictions(index)) + general)
        for index in range(1, len(rows))
    ]


def delta_bytes(path: str, revision: str | None, group: str) -> int | None:
    """Size of the weights that a method trains, from the headers of safetensors files; None where there are no such headers.

    Raises ModelError for a path that is not there; a repository of the hub that is not on this machine has no headers yet.
    """
    try:
        root = locate(path, revision, download=False)
    except ModelError:
        if HUB_ID.fullmatch(path):
            return None
        raise
    weights = find_weights(root / "unet")
    paths, prefix = (
        ([root], "model.diffusion_model.")
        if root.is_file()
        else (weights.paths if weights else [], "")
    )
    if not paths or paths[0].suffix != ".safetensors":
        return None
    total = 0
    for file in paths:
        with safetensors.safe_open(file, framework="pt") as content:
            names = [name for name in content.keys() if name.startswith(prefix)]  # noqa: SIM118
            sizes = {
                name: torch.Size(content.get_slice(name).get_shape()).numel() for name in names
            }
        total += sum(4 * size for name, size in sizes.items() if belongs(name, group))
    return total


def forecast(plan: RunConfig) -> str:
    """The text that `cu-run dry_run=true` prints. Raises ValueError or StoreError for what the run itself would refuse."""
    device = device_name(choose_device(plan.spine))
    sequence, work = plan.sequence.build(), work_of(plan)
    begun = read_run(plan.directory) if (plan.directory / "steps/00/step.json").exists() else None
    if begun is not None and not plan.spine.allow_other_code:
        refuse_other_code(begun.directory, plan.code, begun.code_records)
    done = len(begun.records) if begun is not None else 0
    rates = measure_rates(plan, device)
    lines = [
        f"plan: {sequence.name}, method {plan.method_name}, reg {'+'.join(plan.regularizers) or 'none'}, {plan.setting.plan}"
    ]
    width = max(len(entry.concept) for entry in work)
    for entry in work:
        state = (
            "done"
            if entry.request < done
            else f"from the {entry.start} weights"
            if entry.start
            else ""
        )
        steps = f"{entry.train_steps:>6} steps" if entry.train_steps else " " * 12
        lines.append(
            f"{entry.request:>4}  {entry.concept:<{width}}  {steps}  {entry.images:>6} images  {state}".rstrip()
        )
    left = work[done:]
    if not left:
        return "\n".join([*lines, f"nothing to do: {plan.directory} is complete"])
    retained = len(left) * retained_images(plan)
    num_steps, num_images = (
        sum(entry.train_steps for entry in left),
        sum(entry.images for entry in left),
    )
    most = "at most " if plan.setting.stop_at is not None else ""
    sampler = f"{plan.spine.eval.steps} denoising steps, guidance {plan.spine.eval.guidance:g}"
    lines.append(
        f"to do: {len(left)} of {len(work)} evaluations, {most}{num_steps} training steps of batch {plan.spine.train.batch_size}, "
        f"{num_images} images ({sampler})"
    )
    if retained:
        lines.append(f"retention: {retained} further images, of general prompts")
    lines.append("time: " + time_left(num_steps, num_images + retained, rates, device, most))
    model = plan.model.arguments
    weights = delta_bytes(model["path"], model.get("revision"), plan.method.build().params)
    size = (
        "unknown size" if weights is None else f"{disk_copies(plan, left) * weights / 1e6:.1f} MB"
    )
    free = shutil.disk_usage(existing_parent(plan.directory)).free / 1e9
    lines.append(
        f"disk: {size} of weights at most, cache and checkpoint included; tables and pictures besides; {free:.1f} GB are free"
    )
    return "\n".join([*lines, f"run: {plan.directory} (not touched)"])


def time_left(num_steps: int, num_images: int, rates: Rates, device: str, most: str) -> str:
    """The estimate in words, or why there is none."""
    if rates.image is None or (num_steps and rates.step is None):
        lacking = (
            "evaluation"
            if rates.image is None
            else "training with this method, these regularizers and this batch"
        )
        return f"unknown: no earlier run under outputs measured {lacking} of this model on {device} with these threads"
    training, evaluation = num_steps * (rates.step or 0.0), num_images * rates.image
    return (
        f"{most}about {(training + evaluation) / 60:.1f} min on {device}: training {training:.0f} s, evaluation {evaluation:.0f} s "
        f"(rates measured in {rates.num_runs} earlier runs; start-up and anchor images come on top)"
    )


def existing_parent(path: Path) -> Path:
    """The nearest folder above that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
