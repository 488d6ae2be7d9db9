"""Would a planned run get to its end? Its files, weights, labels, disk, memory and login, tried before GPU time is spent on it.

Every check yields a Finding as soon as it is made. What a run would do is done in small: its model is loaded and makes a few
images, which its evaluator must recognise; one training step of ConAbl's size is timed.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
import torch
import torch.nn.functional as F

from cu_runner.complaints import first_line
from cu_runner.concepts import Sequence
from cu_runner.evaluation import check_labels, evaluate, mean_accuracy
from cu_runner.evaluators.base import Evaluator
from cu_runner.forecast import existing_parent, merges, work_of
from cu_runner.models import DiffusionModel
from cu_runner.params import select_parameters
from cu_runner.process import choose_device
from cu_runner.provenance import device_name, peak_memory_mb
from cu_runner.settings import WandbSettings
from cu_runner.verify import Finding

if TYPE_CHECKING:
    from cu_runner.config import RunConfig

TRIED = 4  # concepts of each kind that a few images are made of
RECOGNISED = 50.0  # percent of them that the untouched model and the evaluator must agree on: by chance it is a few percent
SPARE = 1.2  # the disk must hold so many times what is expected


def check_plan(plan: "RunConfig") -> Iterator[Finding]:
    """Every check, the cheap ones first. What a later one needs and an earlier one could not get is not checked."""
    try:
        device = choose_device(plan.spine)
    except ValueError as error:
        yield Finding("device", False, str(error))
        return
    yield Finding("device", True, device_name(torch.device(device)))
    sequence = plan.sequence.build()
    yield from check_wandb(plan.spine.wandb)
    model = evaluator = None
    for what, node in (("model", plan.model), ("evaluator", plan.evaluator)):
        try:
            started = time.monotonic()
            part = node.build(device=device)
            yield Finding(what, True, f"sha256 {part.fingerprint()[:16]}, loaded in {time.monotonic() - started:.0f} s")
        except (ValueError, OSError) as error:
            yield Finding(what, False, first_line(error))
            continue
        if what == "model":
            model = part
        else:
            evaluator = part
    if plan.retention:
        try:
            plan.retention.build(device=device)
            yield Finding("retention", True)
        except (ValueError, OSError) as error:
            yield Finding("retention", False, first_line(error))
    if evaluator is not None:
        yield check_sequence(sequence, evaluator)
    yield check_disk(plan, model)
    if model is None or evaluator is None:
        yield Finding("images", None, "needs the model and the evaluator")
        return
    yield from check_images(plan, model, evaluator, sequence)


def check_wandb(settings: WandbSettings) -> Iterator[Finding]:
    """With wandb.mode=online: is there a login, and does the server answer?"""
    if settings.mode != "online":
        yield Finding("W&B", True, f"mode {settings.mode}: no login is needed")
        return
    import wandb

    try:
        wandb.login(verify=True, timeout=15)
        yield Finding("W&B", True, f"logged in as {wandb.Api(timeout=15).viewer.username}")
    except Exception as error:  # W&B fails in many ways, all of which mean that the mirror would not be written
        yield Finding("W&B", False, f"{' '.join(str(error).split())[:200]}; run `wandb login`, or use wandb.mode=offline")


def check_sequence(sequence: Sequence, evaluator: Evaluator) -> Finding:
    """Whether the evaluator knows every concept."""
    try:
        check_labels(sequence, evaluator)
    except ValueError as error:
        return Finding("labels", False, str(error))
    labels = evaluator.labels()
    return Finding("labels", True, ", ".join(f"{len(names)} of {domain}" for domain, names in labels.items()))


def check_disk(plan: "RunConfig", model: DiffusionModel | None) -> Finding:
    """Whether the checkpoints of the run fit."""
    if model is None:
        return Finding("disk", None, "needs the model")
    trained = select_parameters(model.unet, plan.method.build().params)
    copies = (2 if merges(plan) else 1) * (len(work_of(plan)) - 1)
    size = copies * sum(4 * parameter.numel() for parameter in trained.values())
    free = shutil.disk_usage(existing_parent(plan.directory)).free
    detail = f"{size / 1e9:.2f} GB of checkpoints, {free / 1e9:.1f} GB free at {existing_parent(plan.directory)}"
    return Finding("disk", free > SPARE * size, detail)


def check_images(plan: "RunConfig", model: DiffusionModel, evaluator: Evaluator, sequence: Sequence) -> Iterator[Finding]:
    """A few images of the untouched model, what the evaluator sees in them, memory, and how long the whole run would take."""
    concepts = [*sequence.targets[:TRIED], *sequence.retain[:TRIED]]
    # on a GPU a whole batch, which is what may not fit
    crosses = sequence.cross_retain[: math.ceil(plan.spine.eval.batch_size / len(concepts)) if model.device.type == "cuda" else 1]
    small = dataclasses.replace(sequence, cross_retain=crosses, seeds=sequence.seeds[:1])
    started = time.monotonic()
    try:
        found = evaluate(model, evaluator, small, concepts, 0, plan.spine.eval).predictions
    except torch.OutOfMemoryError:
        yield Finding("images", False, f"out of GPU memory; lower eval.batch_size={plan.spine.eval.batch_size}")
        return
    per_image = (time.monotonic() - started) / len(found)
    own = mean_accuracy(found, sequence.domain, [concept.name for concept in concepts])
    seen = {sequence.domain: own}
    if sequence.cross_domain in sequence.judged:
        seen[sequence.cross_domain] = mean_accuracy(found, sequence.cross_domain, [concept.name for concept in crosses])
    recognised = ", ".join(f"{accuracy:.0f}% {domain}" for domain, accuracy in seen.items())
    detail = f"{len(found)} images of the untouched model: {recognised} recognised"
    well = min(seen.values()) >= RECOGNISED
    advice = "" if well else "; the model does not know these names, or the labels are in another order"
    yield Finding("base accuracy", well, detail + advice)
    per_step = time_step(plan, model, sequence)
    if per_step is None:
        yield Finding("training", False, f"out of GPU memory; lower train.batch_size={plan.spine.train.batch_size}")
        return
    yield check_memory(model)
    yield Finding("time", True, estimate(plan, per_image, per_step))


def time_step(plan: "RunConfig", model: DiffusionModel, sequence: Sequence) -> float | None:
    """Seconds of a forward and a backward pass over a batch, the second of two; None if memory runs out."""
    params, rows = list(select_parameters(model.unet, plan.method.build().params).values()), plan.spine.train.batch_size
    noisy = torch.randn(rows, *model.latent_shape, device=model.device)
    timesteps = torch.full((rows,), model.num_train_timesteps // 2, device=model.device)
    text = model.encode_prompts([sequence.training_pairs(sequence.targets[0])[0][0]] * rows)
    seconds = 0.0
    try:
        for parameter in params:
            parameter.requires_grad_(True)
        for _ in range(2):
            started = time.monotonic()
            loss = F.mse_loss(model.predict_noise(noisy, timesteps, text), noisy)
            torch.autograd.grad(loss, params, allow_unused=True)[0].norm().item()  # waits for the device
            seconds = time.monotonic() - started
    except torch.OutOfMemoryError:
        return None
    finally:
        for parameter in params:
            parameter.requires_grad_(False)
    return seconds


def check_memory(model: DiffusionModel) -> Finding:
    """What these few passes have taken, of what there is."""
    used = peak_memory_mb(model.device) / 1e3
    total = torch.cuda.mem_get_info(model.device)[1] if model.device.type == "cuda" else psutil.virtual_memory().total
    return Finding("memory", used < total / 1e9, f"{used:.1f} GB at the peak of {total / 1e9:.0f} GB")


def estimate(plan: "RunConfig", per_image: float, per_step: float) -> str:
    """The time of the whole run at the rates that were just measured."""
    work = work_of(plan)
    images, steps = sum(entry.images for entry in work), sum(entry.train_steps for entry in work)
    hours = (images * per_image + steps * per_step) / 3600
    return (
        f"about {hours:.1f} h for {images} images at {per_image:.2f} s and {steps} training steps at {per_step:.2f} s, both "
        "measured just now and in small; methods that sample or make two passes take more"
    )
