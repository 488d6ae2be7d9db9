"""The levers of speed, each with and without, everything else as in a run without compilation.

scripts/bench.py --levers prints it.

Batches, remembered keys and values, fused attention, channels_last, torch.compile (with --compile:
it takes minutes), precisions, gradients of the trained weights alone, cached latents of anchor
images, the fused optimiser (which runs use on a GPU alone). Text that is encoded once, weights that
stay on the device, and classification beside decoding cannot be switched off.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from bench_model import load
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DTYPES, DiffusionModel
from cu_runner.request.scope import Scope


def bench_levers(overrides: list[str], device: str) -> None:
    """Each lever with and without, everything else as in a run without compilation."""
    bench = load(overrides, device)
    plan, model, method, cuda = bench.plan, bench.model, bench.method, device.startswith("cuda")
    bench.prepare()
    speed = replace(plan.spine.speed, compile=False, kv_cache=True, channels_last=True)
    model.speed_up(speed)
    rate = bench.images_per_second()
    say(
        "sampling",
        f"batch of {len(bench.prompts)} in place of 1",
        rate,
        bench.images_per_second(1),
        "images/s",
    )
    model.speed_up(replace(speed, kv_cache=False))
    say("sampling", "kv_cache", rate, bench.images_per_second(), "images/s")
    model.speed_up(speed)
    with sdpa_kernel(SDPBackend.MATH):
        unfused = bench.images_per_second(), 1 / bench.step_seconds()
    steps = 1 / bench.step_seconds()
    say("sampling", "fused attention", rate, unfused[0], "images/s")
    say("training", "fused attention", steps, unfused[1], "steps/s")
    with every_gradient(model):
        say(
            "training",
            "gradients of the trained weights alone",
            steps,
            1 / bench.step_seconds(),
            "steps/s",
        )
    with encoding(method, model, plan.spine.train.batch_size):
        say(
            "training",
            "cached latents of anchor images",
            steps,
            1 / bench.step_seconds(),
            "steps/s",
        )
    with fused_set(method, not cuda):
        other = 1 / bench.step_seconds()
    fused, unfused = (steps, other) if cuda else (other, steps)
    say("training", f"fused {plan.spine.train.optimizer}", fused, unfused, "steps/s")
    if not plan.spine.train.gradient_checkpointing:
        model.checkpoint_gradients()
        say(
            "training",
            "gradient checkpointing, which saves memory",
            1 / bench.step_seconds(),
            steps,
            "steps/s",
        )
        model.denoiser.disable_gradient_checkpointing()
    if cuda:
        model.speed_up(replace(speed, channels_last=False))
        say("sampling", "channels_last", rate, bench.images_per_second(), "images/s")
        say("training", "channels_last", steps, 1 / bench.step_seconds(), "steps/s")
    if plan.spine.speed.compile:
        model.speed_up(replace(speed, compile=True))
        say("sampling", "compile", bench.images_per_second(), rate, "images/s")
        say("training", "compile", 1 / bench.step_seconds(), steps, "steps/s")
    del bench, model, method
    bench_precisions(overrides, device)


def bench_precisions(overrides: list[str], device: str) -> None:
    """bf16, and on a GPU fp16, against fp32.

    Each on a model of its own, since frozen weights are lowered for good.
    """
    plain: tuple[float, float] | None = None
    for precision in DTYPES if device.startswith("cuda") else ("fp32", "bf16"):
        bench = load([*overrides, f"model.precision={precision}", "speed.compile=false"], device)
        bench.prepare()
        found = bench.images_per_second(), 1 / bench.step_seconds()
        plain = plain or found
        if precision != "fp32":
            say("sampling", f"{precision} in place of fp32", found[0], plain[0], "images/s")
            if bench.training_precision != "fp32":
                say("training", f"{precision} in place of fp32", found[1], plain[1], "steps/s")


def say(what: str, lever: str, rate: float, without: float, unit: str) -> None:
    print(
        (
            f"lever, {what}: {lever}: {rate:.2f} {unit}, without {without:.2f}: "
            f"{rate / without:.2f} times"
        ),
        flush=True,
    )


@contextmanager
def every_gradient(model: DiffusionModel) -> Iterator[None]:
    """Gradients of all weights of the UNet, back to the first layer."""
    model.denoiser.requires_grad_(True)
    try:
        yield
    finally:
        model.denoiser.requires_grad_(False).zero_grad(set_to_none=True)


@contextmanager
def encoding(method: Method, model: DiffusionModel, batch_size: int) -> Iterator[None]:
    """Every batch encodes its images again, as scripts do that keep pictures."""
    pictures, side, draw = (
        torch.rand(batch_size, 3, model.resolution, model.resolution),
        model.device,
        method.batch,
    )

    def batch(scope: Scope, step: int) -> object:
        model.encode_images(pictures.to(side))
        return draw(scope, step)

    method.batch = batch
    try:
        yield
    finally:
        del method.batch


@contextmanager
def fused_set(method: Method, fused: bool) -> Iterator[None]:
    """Take the optimiser's step as one kernel, or not."""
    move = method.update

    def update(scope: Scope, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["fused"] = fused
        move(scope, optimizer)

    method.update = update
    try:
        yield
    finally:
        del method.update
