"""Would a planned run get to its end? What it needs is tried before GPU time is spent on it.

Its files, weights, labels, disk, memory and login are checked one by one; then the run is
rehearsed: the runner itself runs on a truncated plan. Every check yields a Finding.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from cu_runner.concepts.sequence import Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.evaluate import check_labels
from cu_runner.evaluators.metrics import RECOGNISED
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.sampling import make_scheduler
from cu_runner.recovery.base import Probe
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.token_limit import check_prompts
from cu_runner.retention.base import Retention
from cu_runner.runner import probing
from cu_runner.runner.forecast import disk_copies, existing_parent, retained_images, work_of
from cu_runner.runner.own_images import (
    check_pictured,
    describe_folders,
    picture_folders,
    read_whole,
)
from cu_runner.runner.parts import RunParts, check_linear, check_words, named, prepare
from cu_runner.runner.probing import build_probes
from cu_runner.runner.rehearsal import Rehearsal, rehearse
from cu_runner.runner.training import check_composition
from cu_runner.runner.weights import choose
from cu_runner.runtime.devices import choose_device, device_name, limit_threads, peak_memory_mb
from cu_runner.runtime.lazy import torch
from cu_runner.runtime.progress import slow
from cu_runner.runtime.user_code import place_of
from cu_runner.schema.errors import SamplingError, StoreError, TrainingError, first_line
from cu_runner.schema.settings import Sampler
from cu_runner.store.verify import Finding

if TYPE_CHECKING:
    from torch import nn

Part = TypeVar("Part", DiffusionModel, Evaluator, Retention)
Made = Generator[Finding, None, Part | None]

SPARE_DISK = 1.2  # the disk must hold so many times what is expected
SPARE_MEMORY = 1.1  # and memory so many times what the check took: in hours it is fragmented
UNKNOWN = (
    f"; under {RECOGNISED:.0f}% nothing can be measured: the model does not know these names in "
    "these prompts, or the labels are in another order"
)
SMALLEST = "out of GPU memory at a single image; free it of other processes, or take a larger one"
FAILURES = (ValueError, OSError, TrainingError, SamplingError, StoreError)


def check_plan(plan: RunConfig) -> Iterator[Finding]:
    """Yield every check, the cheap ones first; what needs a part that is missing is not made."""
    try:
        device = choose_device(plan.spine)
    except ValueError as error:
        yield Finding("device", False, str(error))
        return
    limit_threads(plan.spine.num_threads)
    yield Finding("device", True, device_name(device))
    free = free_memory(torch.device(device))
    yield from check_trackers(plan)
    parts = yield from check_parts(plan, device)
    if parts is None:
        for what in ("images", "training", "memory", "time"):
            yield Finding(what, None, "needs every part of the run, and its schedulers")
        return
    rehearsal, ended = rehearse(plan, parts)
    yield from check_rehearsal(plan, parts, rehearsal, ended)
    yield check_memory(plan, torch.device(device), free)
    if ended is not None or rehearsal.per_image is None or rehearsal.per_step is None:
        yield Finding("time", None, "needs the images and the training")
    else:
        rates = (rehearsal.per_image, rehearsal.per_step)
        yield Finding("time", True, estimate(plan, parts.method, *rates))


# ----------------------------------------------------------------------------------------- parts
def check_parts(plan: RunConfig, device: str) -> Generator[Finding, None, RunParts | None]:
    """Make every part of the run; return them, None if one of them cannot be made or used."""
    sequence = plan.sequence.build()
    requests = plan.requests(sequence)
    readable = yield from check_pictures(plan, sequence)
    model = yield from load("model", lambda: plan.model.build(device=device))
    evaluator = yield from load("evaluator", lambda: plan.evaluator.build(device=device))
    retention = None
    if node := plan.retention:
        retention = yield from load("retention", lambda: load_retention(node.build(device=device)))
    probes = yield from check_probes(plan, sequence, model)
    composed = yield from check_composed(plan, model)
    labels = yield from check_sequence(sequence, evaluator, model)
    if model is None or composed is None:
        yield Finding("disk", None, "needs the model, and a method that takes these regularizers")
        return None
    method, regularizers = composed
    yield check_disk(plan, choose(model, method, regularizers.values(), sequence))
    samplers = {"anchors": plan.spine.anchors, "eval": plan.spine.eval}
    found = [check_scheduler(key, model, sampler) for key, sampler in samplers.items()]
    yield from found
    lacking = evaluator is None or (plan.retention is not None and retention is None)
    lacking = lacking or probes is None or not readable
    if evaluator is None or lacking or not labels or not all(each.ok for each in found):
        return None
    prepare(model, plan.spine.speed, plan.spine.train)
    return RunParts(
        model, evaluator, retention, sequence, requests, method, regularizers, probes or {}
    )


def check_pictures(plan: RunConfig, sequence: Sequence) -> Generator[Finding, None, bool]:
    """Read every picture of the user's that is trained on; return whether all can be read."""
    side, well = plan.model.arguments.get("resolution"), True
    for folder in picture_folders(plan, sequence):
        try:
            small = read_whole(folder, side if isinstance(side, int) else 0)
        except ValueError as error:
            well = False
            yield Finding("own images", False, first_line(error))
            continue
        enlarged = f"; {small} smaller than {side} pixels, which are enlarged" if small else ""
        yield Finding("own images", True, f"{next(describe_folders([folder]))}{enlarged}")
    return well


def load(what: str, make: Callable[[], Part]) -> Made[Part]:
    """Make a part of the run that reads weights; return it, None if it cannot be made."""
    started = time.monotonic()
    try:
        with slow(f"loading the {what}"):
            part = make()
            sha256 = part.fingerprint()
    except (ValueError, OSError) as error:
        yield Finding(what, False, first_line(error))
        return None
    seconds = time.monotonic() - started
    yield Finding(what, True, f"sha256 {sha256[:16]}, loaded in {seconds:.0f} s")
    return part


def load_retention(retention: Retention) -> Retention:
    """Load what judges the retention. Raises ValueError or OSError for what cannot be read."""
    retention.load()
    return retention


def check_probes(
    plan: RunConfig, sequence: Sequence, model: DiffusionModel | None
) -> Generator[Finding, None, dict[str, Probe] | None]:
    """Make the probes of recovery; return them, None if one of them cannot probe the sequence."""
    try:
        probes = build_probes(plan, sequence)
        if model is not None:
            check_words(model, {f"recovery={name}": probe for name, probe in probes.items()})
            probing.check_probes(probes, model, sequence, plan.spine.eval)
    except (ValueError, OSError) as error:
        yield Finding("recovery", False, said_where(error))
        return None
    if probes:
        yield Finding("recovery", True, ", ".join(probes))
    return probes


def check_composed(
    plan: RunConfig, model: DiffusionModel | None
) -> Generator[Finding, None, tuple[Method[Any], dict[str, Regularizer]] | None]:
    """Make the method and the regularizers; return them if they go together and find weights."""
    try:
        method = plan.method.build()
        regularizers = {name: node.build() for name, node in plan.regularizers.items()}
        check_composition(method, regularizers, plan.spine.train)
        method.check(plan.sequence.build())
        check_pictured(plan.method_name, method, plan.sequence.build())
        if model is not None:
            chosen = named(plan.method_name, method, regularizers)
            check_words(model, chosen)
            check_linear(model, method, chosen)
            choose(model, method, regularizers.values(), plan.sequence.build())
    except (ValueError, OSError) as error:
        yield Finding("composition", False, said_where(error))
        return None
    names = "+".join(regularizers) or "no regularizer"
    yield Finding("composition", True, f"{plan.method_name} with {names}")
    return method, regularizers


def check_sequence(
    sequence: Sequence, evaluator: Evaluator | None, model: DiffusionModel | None
) -> Generator[Finding, None, bool]:
    """Check that the evaluator knows every concept and the model reads it in its prompts.

    Return whether they do.
    """
    try:
        if model is not None:
            check_prompts(model, sequence)
    except ValueError as error:
        yield Finding("prompts", False, str(error))
        return False
    if evaluator is None:
        return False
    try:
        check_labels(sequence, evaluator)
    except ValueError as error:
        yield Finding("labels", False, str(error))
        return False
    counts = (f"{len(names)} of {domain}" for domain, names in evaluator.labels().items())
    yield Finding("labels", True, ", ".join(counts))
    return True


def check_scheduler(key: str, model: DiffusionModel, sampler: Sampler) -> Finding:
    """Check that a sampler's scheduler can be made. key: the setting it comes from."""
    try:
        return Finding(f"scheduler of {key}", True, type(make_scheduler(model, sampler)).__name__)
    except ValueError as error:
        return Finding(f"scheduler of {key}", False, f"{key}.{first_line(error)}")


def check_trackers(plan: RunConfig) -> Iterator[Finding]:
    """Check each tracker: W&B with wandb.mode=online needs a login, and a server that answers."""
    for node in plan.trackers.values():
        try:
            yield Finding(node.made.title, True, node.build().check())
        except Exception as error:  # they fail in many ways; in each nothing would be written
            yield Finding(node.made.title, False, said_where(error))


def check_disk(plan: RunConfig, params: dict[str, nn.Parameter]) -> Finding:
    """Check that the weights that the run keeps fit. params: those that it trains."""
    bytes_of_one = sum(4 * parameter.numel() for parameter in params.values())
    size = disk_copies(plan, work_of(plan)) * bytes_of_one
    parent = existing_parent(plan.directory)
    free = shutil.disk_usage(parent).free
    detail = (
        f"{size / 1e9:.2f} GB of weights at most, cache and checkpoint included; "
        f"{free / 1e9:.1f} GB free at {parent}"
    )
    return Finding("disk", free > SPARE_DISK * size, detail)


# ------------------------------------------------------------------------------------- rehearsal
def check_rehearsal(
    plan: RunConfig, parts: RunParts, rehearsal: Rehearsal, error: Exception | None
) -> Iterator[Finding]:
    """Yield what the rehearsal found, stage by stage, down to the error that ended it."""
    failed = rehearsal.stages[-1] if rehearsal.stages else "images"
    expected = (*FAILURES, torch.OutOfMemoryError)
    if error is not None and not isinstance(error, expected) and place_of(error) is None:
        raise error
    if rehearsal.per_image is not None:
        yield check_accuracy(rehearsal)
    elif error is not None:
        out = isinstance(error, torch.OutOfMemoryError)  # sampling has come down to one image
        yield Finding("images", False, SMALLEST if out else first_line(error))
    for what in ("method", *(f"reg.{name}" for name in parts.regularizers), "training"):
        if error is not None and what == failed:
            out = isinstance(error, torch.OutOfMemoryError)
            why = f"out of GPU memory; {less_memory(plan)}" if out else said_where(error)
            yield Finding(what, False, why)
        elif what in rehearsal.stages:
            yield Finding(what, True)
        elif what == "training":
            yield Finding(what, None, "needs the method and the regularizers")


def said_where(error: Exception) -> str:
    """Return what an error says first, behind its place in the user's own code if it is there."""
    place = place_of(error)
    return f"{place}: {type(error).__name__}: {first_line(error)}" if place else first_line(error)


def check_accuracy(rehearsal: Rehearsal) -> Finding:
    """Check that the evaluator recognises what the untouched model draws."""
    seen = rehearsal.accuracy
    shares = ", ".join(f"{accuracy:.0f}% {kind}" for kind, accuracy in seen.items())
    well = min(seen.values()) >= RECOGNISED
    detail = f"of {rehearsal.images} images of the untouched model, {shares} are recognised"
    return Finding("base accuracy", well, detail + ("" if well else UNKNOWN))


def less_memory(plan: RunConfig) -> str:
    """Say what to change where memory does not suffice, what changes no result first."""
    train, batch = plan.spine.train, plan.spine.eval.batch_size
    same = [] if train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    same += [f"eval.batch_size={batch // 2}"] if batch > 1 else []
    bf16 = plan.resolved["model"].get("precision") == "bf16"
    other = [] if bf16 else ["model.precision=bf16"]
    other += [f"train.batch_size={train.batch_size // 2}"] if train.batch_size > 1 else []
    advice = [
        (same, "for less memory and the same results"),
        (other, "for less memory in another experiment"),
    ]
    return "; ".join(f"{' and '.join(ways)} {effect}" for ways, effect in advice if ways)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may have: on a CPU, also those that it has already."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def check_memory(plan: RunConfig, device: torch.device, free: int) -> Finding:
    """Hold what the check has taken at its peak against what was free (bytes) before it."""
    used = peak_memory_mb(device) * 2**20
    well = SPARE_MEMORY * used < free
    more = f"; a long run needs {SPARE_MEMORY:g} times that; {less_memory(plan)}"
    detail = f"{used / 1e9:.1f} GB at the peak, {free / 1e9:.1f} GB were free"
    return Finding("memory", well, detail + ("" if well else more))


def estimate(plan: RunConfig, method: Method[Any], per_image: float, per_step: float) -> str:
    """Return the time of the whole run at the rates that were just measured."""
    work, general = work_of(plan), retained_images(plan)
    evaluations = sum(plan.spine.eval.is_due(entry.request, len(work) - 1) for entry in work)
    general *= evaluations
    images = sum(entry.images for entry in work) + general
    steps = len(work) - 1 if method.closed_form else sum(entry.train_steps for entry in work)
    hours = (images * per_image + steps * per_step) / 3600
    retained = f" ({general} of them of general prompts)" if general else ""
    stops = ", what ends requests early" if plan.setting.ends_early else ""
    return (
        f"about {hours:.1f} h for {images} images{retained} at {per_image:.2f} s and {steps} "
        f"training steps at {per_step:.2f} s, measured just now and in small; anchor images, "
        f"what a request prepares{stops} and start-up come on top"
    )
