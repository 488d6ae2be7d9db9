"""What a run would do, before it does anything: requests, training steps, images, time from measured rates, disk. dry_run=true.

Time is never guessed: it comes from step.json of earlier runs of the same model on the same device with as many threads, or it is
said to be unknown.
"""

import shutil
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch

from cu_runner.concepts import Concept, Request, Sequence, plan_requests
from cu_runner.model_files import HUB_ID, ModelError, find_weights, locate
from cu_runner.params import belongs
from cu_runner.process import choose_device
from cu_runner.provenance import device_name
from cu_runner.runs import RunRecord, find_runs, read_run
from cu_runner.store import StoreError

if TYPE_CHECKING:  # config.py stands at the door; this file takes its checked result
    from cu_runner.config import RunConfig

SIMILAR_RUNS = 20  # the newest of this many earlier runs are enough for a rate


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
    """Seconds per training step and per evaluated image, medians over the requests of earlier runs; None where there are none."""

    step: float | None
    image: float | None
    num_runs: int


def merges(plan: "RunConfig") -> bool:
    """Whether a regularizer merges: two files of weights per request then, and every concept so far is measured."""
    return any(node.build().independent_starts for node in plan.regularizers.values())


def work_of(plan: "RunConfig") -> list[Work]:
    """What every step of a run is."""
    sequence, steps = plan.sequence.build(), 0 if plan.method.build().closed_form else plan.spine.train.steps
    return plan_work(sequence, plan_requests(sequence, plan.setting.plan), steps, merges(plan))


def plan_work(sequence: Sequence, requests: list[Request], train_steps: int, merging: bool) -> list[Work]:
    """Training steps and evaluation images of every step.

    Args:
        train_steps: of one request, at most.
        merging: whether every concept so far is measured, though each request unlearns one.
    """

    def count(unlearned: Iterable[Concept]) -> int:
        return len(sequence.evaluation_images([*unlearned, *sequence.retain]))

    work = [Work(0, "untouched model", "", 0, count(sequence.targets))]
    for request in requests:
        unlearned = [each.targets[-1] for each in requests[: request.index]] if merging else request.erased
        work.append(Work(request.index, request.label, request.start, train_steps, count(unlearned)))
    return work


def measure_rates(plan: "RunConfig", device: str) -> Rates:
    """Rates of earlier runs under the same outputs, with the same model, device and threads; steps: also with the same method."""
    root = Path(plan.spine.paths.outputs) / "runs"
    directories = find_runs([root]) if root.is_dir() and any(root.glob("*/*/config.yaml")) else []
    steps, images, used = [], [], 0
    for directory in sorted(directories, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            run = read_run(directory)
        except StoreError:  # a damaged run measures nothing
            continue
        if any(run.config[key] != plan.resolved[key] for key in ("model", "num_threads")) or run.records[0]["device"] != device:
            continue
        same_method = all(run.config[key] == plan.resolved[key] for key in ("method", "reg"))
        same_batch = run.config["train"]["batch_size"] == plan.spine.train.batch_size
        own_steps, own_images = seconds_of(run)
        if run.config["eval"] == plan.resolved["eval"]:
            images += own_images
        if same_method and same_batch:
            steps += own_steps
        used += 1
        if used == SIMILAR_RUNS:
            break
    return Rates(statistics.median(steps) if steps else None, statistics.median(images) if images else None, used)


def seconds_of(run: RunRecord) -> tuple[list[float], list[float]]:
    """Seconds per training step and per image of every request that was trained and not taken from the cache."""
    steps, images = [], []
    for index, record in enumerate(run.records[1:], start=1):
        row = record["row"]
        if row["train_steps"] and not record["training"].get("cached"):
            steps.append(row["train_seconds"] / row["train_steps"])
        images.append(row["eval_seconds"] / len(run.predictions(index)))
    return steps, images


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
    paths, prefix = ([root], "model.diffusion_model.") if root.is_file() else (weights.paths if weights else [], "")
    if not paths or paths[0].suffix != ".safetensors":
        return None
    total = 0
    for file in paths:
        with safetensors.safe_open(file, framework="pt") as content:
            names = [name for name in content.keys() if name.startswith(prefix)]  # noqa: SIM118
            sizes = {name: torch.Size(content.get_slice(name).get_shape()).numel() for name in names}
        total += sum(4 * size for name, size in sizes.items() if belongs(name, group))
    return total


def forecast(plan: "RunConfig") -> str:
    """The text that `cu-run dry_run=true` prints. Raises ValueError for what the run itself would refuse at its start."""
    device = device_name(torch.device(choose_device(plan.spine)))
    sequence, work = plan.sequence.build(), work_of(plan)
    done = len(read_run(plan.directory).records) if (plan.directory / "steps/00/step.json").exists() else 0
    rates = measure_rates(plan, device)
    lines = [f"plan: {sequence.name}, method {plan.method_name}, reg {'+'.join(plan.regularizers) or 'none'}, {plan.setting.plan}"]
    width = max(len(entry.concept) for entry in work)
    for entry in work:
        state = "done" if entry.request < done else f"from the {entry.start} weights" if entry.start else ""
        steps = f"{entry.train_steps:>6} steps" if entry.train_steps else " " * 12
        lines.append(f"{entry.request:>4}  {entry.concept:<{width}}  {steps}  {entry.images:>6} images  {state}".rstrip())
    left = work[done:]
    if not left:
        return "\n".join([*lines, f"nothing to do: {plan.directory} is complete"])
    num_steps, num_images = sum(entry.train_steps for entry in left), sum(entry.images for entry in left)
    most = "at most " if plan.setting.stop_at is not None else ""
    sampler = f"{plan.spine.eval.steps} denoising steps, guidance {plan.spine.eval.guidance:g}"
    lines.append(
        f"to do: {len(left)} of {len(work)} evaluations, {most}{num_steps} training steps of batch {plan.spine.train.batch_size}, "
        f"{num_images} images ({sampler})"
    )
    if plan.retention:
        retained = len(left) * plan.retention.build().num_images
        lines.append(f"retention: {retained} further images, of general prompts; their time is not in the estimate")
    lines.append("time: " + time_left(num_steps, num_images, rates, device, most))
    copies = (2 if merges(plan) else 1) * sum(1 for entry in left if entry.request)
    model = plan.model.arguments
    weights = delta_bytes(model["path"], model.get("revision"), plan.method.build().params)
    size = "unknown size" if weights is None else f"{copies * weights / 1e6:.1f} MB"
    free = shutil.disk_usage(existing_parent(plan.directory)).free / 1e9
    lines.append(f"disk: {size} of checkpoints, besides tables and pictures; {free:.1f} GB are free")
    return "\n".join([*lines, f"run: {plan.directory} (not touched)"])


def time_left(num_steps: int, num_images: int, rates: Rates, device: str, most: str) -> str:
    """The estimate in words, or why there is none."""
    if rates.image is None or (num_steps and rates.step is None):
        lacking = "evaluation" if rates.image is None else "training with this method, these regularizers and this batch"
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
