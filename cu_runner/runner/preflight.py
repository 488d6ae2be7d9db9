"""Would a planned run get to its end? Its files, weights, labels, disk, memory and login, tried before GPU time is spent on it.

Every check yields a Finding as soon as it is made. What a run would do is done in small, by the run's own code and as the run would
do it: the model makes a few images, which the evaluator must recognise; the method and the regularizers begin the first and the
last request, and train for a step or two.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

from cu_runner.concepts.requests import plan_requests
from cu_runner.concepts.sequence import Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.evaluate import check_labels, evaluate
from cu_runner.evaluators.metrics import mean_accuracy
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import select_parameters, snapshot
from cu_runner.models.sampling import make_scheduler
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.anchors import AnchorImages
from cu_runner.request.scope import Scope
from cu_runner.retention.base import Retention
from cu_runner.runner.forecast import disk_copies, existing_parent, retained_images, work_of
from cu_runner.runner.runner import prepare
from cu_runner.runner.training import Training, check_composition
from cu_runner.runtime.devices import choose_device, device_name, peak_memory_mb
from cu_runner.runtime.lazy import nn, torch
from cu_runner.runtime.seeding import RandomSource
from cu_runner.schema.errors import SamplingError, TrainingError, first_line
from cu_runner.schema.settings import Sampler, WandbSettings
from cu_runner.store.cache import Cache
from cu_runner.store.verify import Finding

if TYPE_CHECKING:
    from torch import Tensor

Part = TypeVar("Part", DiffusionModel, Evaluator, Retention)


TRIED = 4  # concepts of each kind that a few images are made of


RECOGNISED = 50.0  # percent of them that the untouched model and the evaluator must agree on: by chance it is a few percent


SPARE_DISK = 1.2  # the disk must hold so many times what is expected


SPARE_MEMORY = 1.1  # and memory so many times what the check took: in hours it is fragmented


def check_plan(plan: RunConfig) -> Iterator[Finding]:
    """Every check, the cheap ones first. What a later one needs and an earlier one could not get is not checked."""
    try:
        device = choose_device(plan.spine)
    except ValueError as error:
        yield Finding("device", False, str(error))
        return
    yield Finding("device", True, device_name(torch.device(device)))
    free = free_memory(torch.device(device))
    sequence = plan.sequence.build()
    yield from check_wandb(plan.spine.wandb)
    model = yield from load("model", lambda: plan.model.build(device=device))
    evaluator = yield from load("evaluator", lambda: plan.evaluator.build(device=device))
    retention = (
        (yield from load("retention", lambda: load_retention(plan, device)))
        if plan.retention
        else None
    )
    parts = yield from check_parts(plan, model)
    if evaluator is not None:
        yield check_sequence(sequence, evaluator)
    if model is None or parts is None:
        for what in ("disk", "images", "training"):
            yield Finding(what, None, "needs the model, and a method that takes these regularizers")
        return
    method, regularizers = parts
    prepare(model, plan.spine.speed, plan.spine.train)
    params = select_parameters(model.unet, method.params)
    model.lower_frozen(params)
    yield check_disk(plan, params)
    found = {
        key: check_scheduler(key, model, sampler)
        for key, sampler in (("anchors", plan.spine.anchors), ("eval", plan.spine.eval))
    }
    yield from found.values()
    per_image = None
    if evaluator is None or not found["eval"].ok:
        yield Finding("images", None, "needs the evaluator and the scheduler")
    else:
        per_image = yield from check_images(plan, model, evaluator, sequence)
    anchors = (
        plan.spine.anchors
        if found["anchors"].ok
        else dataclasses.replace(plan.spine.anchors, scheduler=None)
    )
    per_step = yield from check_training(
        plan, model, sequence, method, regularizers, params, anchors
    )
    yield check_memory(plan, model.device, free)
    if per_image is None or per_step is None or (plan.retention and retention is None):
        yield Finding("time", None, "needs the images, the training and the retention")
    else:
        yield Finding("time", True, estimate(plan, method, per_image, per_step))


def load(what: str, make: Callable[[], Part]) -> Generator[Finding, None, Part | None]:
    """Make a part of the run that reads weights; returns it, None if it cannot be made."""
    started = time.monotonic()
    try:
        part = make()
    except (ValueError, OSError) as error:
        yield Finding(what, False, first_line(error))
        return None
    yield Finding(
        what,
        True,
        f"sha256 {part.fingerprint()[:16]}, loaded in {time.monotonic() - started:.0f} s",
    )
    return part


def load_retention(plan: RunConfig, device: str) -> Retention:
    """What measures the retention, with its judges. Raises ValueError or OSError for what cannot be read."""
    retention = plan.retention.build(device=device)
    retention.load()
    return retention


def check_parts(
    plan: RunConfig, model: DiffusionModel | None
) -> Generator[Finding, None, tuple[Method, dict[str, Regularizer]] | None]:
    """Whether the method and the regularizers can be made, go together and find weights to train; returns them."""
    try:
        method = plan.method.build()
        regularizers = {name: node.build() for name, node in plan.regularizers.items()}
        check_composition(method, regularizers)
        if model is not None:
            select_parameters(model.unet, method.params)
    except (ValueError, OSError) as error:
        yield Finding("composition", False, first_line(error))
        return None
    yield Finding(
        "composition", True, f"{plan.method_name} with {'+'.join(regularizers) or 'no regularizer'}"
    )
    return method, regularizers


def check_scheduler(key: str, model: DiffusionModel, sampler: Sampler) -> Finding:
    """Whether a sampler's scheduler can be made. key: the setting it comes from."""
    try:
        return Finding(f"scheduler of {key}", True, type(make_scheduler(model, sampler)).__name__)
    except ValueError as error:
        return Finding(f"scheduler of {key}", False, f"{key}.{first_line(error)}")


def check_wandb(settings: WandbSettings) -> Iterator[Finding]:
    """With wandb.mode=online: is there a login, and does the server answer?"""
    if settings.mode != "online":
        yield Finding("W&B", True, f"mode {settings.mode}: no login is needed")
        return
    import wandb

    try:
        wandb.login(verify=True, timeout=15)
        yield Finding("W&B", True, f"logged in as {wandb.Api(timeout=15).viewer.username}")
    except (
        Exception
    ) as error:  # W&B fails in many ways, all of which mean that the mirror would not be written
        yield Finding(
            "W&B",
            False,
            f"{' '.join(str(error).split())[:200]}; run `wandb login`, or use wandb.mode=offline",
        )


def check_sequence(sequence: Sequence, evaluator: Evaluator) -> Finding:
    """Whether the evaluator knows every concept."""
    try:
        check_labels(sequence, evaluator)
    except ValueError as error:
        return Finding("labels", False, str(error))
    labels = evaluator.labels()
    return Finding(
        "labels", True, ", ".join(f"{len(names)} of {domain}" for domain, names in labels.items())
    )


def check_disk(plan: RunConfig, params: dict[str, nn.Parameter]) -> Finding:
    """Whether the weights that the run keeps fit. params: those that it trains."""
    size = disk_copies(plan, work_of(plan)) * sum(
        4 * parameter.numel() for parameter in params.values()
    )
    parent = existing_parent(plan.directory)
    free = shutil.disk_usage(parent).free
    detail = f"{size / 1e9:.2f} GB of weights at most, cache and checkpoint included; {free / 1e9:.1f} GB free at {parent}"
    return Finding("disk", free > SPARE_DISK * size, detail)


def check_images(
    plan: RunConfig, model: DiffusionModel, evaluator: Evaluator, sequence: Sequence
) -> Generator[Finding, None, float | None]:
    """A few images of the untouched model, and what the evaluator sees in them; returns seconds per image."""
    concepts = [*sequence.targets[:TRIED], *sequence.retain[:TRIED]]
    crosses = sequence.cross_retain[: math.ceil(images_together(plan, model) / len(concepts))]
    small = dataclasses.replace(sequence, cross_retain=crosses, seeds=sequence.seeds[:1])
    started = time.monotonic()
    try:
        found = evaluate(model, evaluator, small, concepts, 0, plan.spine.eval).predictions
    except torch.OutOfMemoryError:  # evaluate() has come down to one image
        yield Finding(
            "images",
            False,
            "out of GPU memory at a single image; free it of other processes, or take a larger one",
        )
        return None
    except SamplingError as error:
        yield Finding("images", False, first_line(error))
        return None
    per_image = (time.monotonic() - started) / len(found)
    own = mean_accuracy(found, sequence.domain, [concept.name for concept in concepts])
    seen = {sequence.domain: own}
    if sequence.cross_domain in sequence.measured_domains:
        seen[sequence.cross_domain] = mean_accuracy(
            found, sequence.cross_domain, [concept.name for concept in crosses]
        )
    recognised = ", ".join(f"{accuracy:.0f}% {domain}" for domain, accuracy in seen.items())
    detail = f"{len(found)} images of the untouched model: {recognised} recognised"
    well = min(seen.values()) >= RECOGNISED
    advice = (
        "" if well else "; the model does not know these names, or the labels are in another order"
    )
    yield Finding("base accuracy", well, detail + advice)
    return per_image


def images_together(plan: RunConfig, model: DiffusionModel) -> int:
    """How many images are tried at once: on a GPU a whole batch, which is what may not fit."""
    return plan.spine.eval.batch_size if model.device.type == "cuda" else 1


def check_training(
    plan: RunConfig,
    model: DiffusionModel,
    sequence: Sequence,
    method: Method,
    regularizers: dict[str, Regularizer],
    params: dict[str, nn.Parameter],
    anchors: Sampler,
) -> Generator[Finding, None, float | None]:
    """The first request is begun, the last one begun and trained for two steps; returns seconds of the second step.

    Anchors are one real batch, repeated as often as a method asks for images.
    """
    requests = plan_requests(sequence, plan.setting.plan, plan.setting.last_only)
    base, together = snapshot(params), images_together(plan, model)
    made: list[Tensor] = []

    def few(prompts: list[str], number: int, *, mirrored: bool = False) -> Tensor:
        if not made:
            with tempfile.TemporaryDirectory() as folder:
                images = AnchorImages(
                    model,
                    "",
                    params,
                    base,
                    anchors,
                    Cache(Path(folder), plan.code),
                    plan.spine.eval.batch_size,
                )
                made.append(images.latents(prompts, min(number, together)))
        return made[0][[i % len(made[0]) for i in range(number)]]

    first, last = (
        Scope(
            model=model,
            sequence=sequence,
            request=request,
            params=params,
            start=base,
            base=base,
            rng=RandomSource(plan.spine.seed, request.index),
            batch_size=plan.spine.train.batch_size,
            steps=plan.spine.train.steps,
            anchors=few,
        )
        for request in (requests[0], requests[-1])
    )
    for parameter in params.values():  # as Training does before anything begins
        parameter.requires_grad_(True)
    begun = [attempt(plan, "method", lambda: method.begin_request(first))]
    yield begun[0]
    for name, regularizer in regularizers.items() if begun[0].ok else ():
        begun.append(
            attempt(plan, f"reg.{name}", lambda each=regularizer: each.begin_request(first, method))
        )
        yield begun[-1]
    if not all(finding.ok for finding in begun):
        yield Finding("training", None, "needs the method and the regularizers")
        return None
    seconds: list[float] = []
    yield attempt(
        plan, "training", lambda: seconds.append(time_step(plan, last, method, regularizers))
    )
    return seconds[0] if seconds else None


def attempt(plan: RunConfig, what: str, act: Callable[[], None]) -> Finding:
    """Whether something that a request does succeeds."""
    try:
        act()
    except torch.OutOfMemoryError:
        return Finding(what, False, f"out of GPU memory; {less_memory(plan)}")
    except (ValueError, OSError, TrainingError) as error:
        return Finding(what, False, first_line(error))
    return Finding(what, True)


def time_step(
    plan: RunConfig, scope: Scope, method: Method, regularizers: dict[str, Regularizer]
) -> float:
    """Seconds of the second training step of a request: the first one warms up. Raises as Training does."""
    training, seconds = Training(scope, method, regularizers, plan.spine.train), 0.0
    for _ in range(min(2, training.steps)):
        started = time.monotonic()
        training.step()
        if scope.model.device.type == "cuda":
            torch.cuda.synchronize(scope.model.device)
        seconds = time.monotonic() - started
    training.finish()
    return seconds


def less_memory(plan: RunConfig) -> str:
    """What to change where memory does not suffice, the settings that change no result first."""
    train, batch = plan.spine.train, plan.spine.eval.batch_size
    same = [] if train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    same += [f"eval.batch_size={batch // 2}"] if batch > 1 else []
    other = [] if plan.resolved["model"].get("precision") == "bf16" else ["model.precision=bf16"]
    other += [f"train.batch_size={train.batch_size // 2}"] if train.batch_size > 1 else []
    advice = [
        (same, "for less memory and the same results"),
        (other, "for less memory in another experiment"),
    ]
    return "; ".join(f"{' and '.join(ways)} {effect}" for ways, effect in advice if ways)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may have: those that are free, and on a CPU those that it has already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def check_memory(plan: RunConfig, device: torch.device, free: int) -> Finding:
    """What the check has taken at its peak, of what was free (bytes) before it."""
    used = peak_memory_mb(device) * 2**20
    well = SPARE_MEMORY * used < free
    advice = "" if well else f"; a long run needs {SPARE_MEMORY:g} times that; {less_memory(plan)}"
    return Finding(
        "memory", well, f"{used / 1e9:.1f} GB at the peak, {free / 1e9:.1f} GB were free{advice}"
    )


def estimate(plan: RunConfig, method: Method, per_image: float, per_step: float) -> str:
    """The time of the whole run at the rates that were just measured."""
    work, general = work_of(plan), retained_images(plan)
    images = sum(entry.images + general for entry in work)
    steps = len(work) - 1 if method.closed_form else sum(entry.train_steps for entry in work)
    hours = (images * per_image + steps * per_step) / 3600
    retained = f" ({general * len(work)} of them of general prompts)" if general else ""
    stops = ", what setting.stop_at measures" if plan.setting.stop_at is not None else ""
    return (
        f"about {hours:.1f} h for {images} images{retained} at {per_image:.2f} s and {steps} training steps at {per_step:.2f} s, "
        f"measured just now and in small; anchor images, what a request prepares{stops} and start-up come on top"
    )
