"""Measure what a user waits for: start-up, images/s, training steps/s, the main job. `make bench`.

    python scripts/bench.py                      # everything, on the fastest device there is
    python scripts/bench.py --skip-main          # without the main job
    python scripts/bench.py --methods            # what a training step of every method costs, and nothing else
    python scripts/bench.py --device cpu --precision bf16

Fractions of peak compare the UNet's floating-point operations with a large matrix product in the same precision, timed here.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import transformers
import yaml
from torch.utils.flop_counter import FlopCounterMode

from cu_runner.concepts import make_sequence, plan_requests
from cu_runner.config import RunConfig, compose
from cu_runner.methods.base import Scope
from cu_runner.methods.conabl import ConAbl
from cu_runner.models import DTYPES, DiffusionModel, load_model
from cu_runner.params import assign, select_parameters, snapshot
from cu_runner.sampling import generate
from cu_runner.seeding import RandomSource
from cu_runner.settings import Sampler, TrainSettings
from cu_runner.training import erase

CONF = Path(__file__).parent.parent / "conf"


def read(group: str, name: str) -> dict[str, object]:
    node = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    del node["_target_"]
    return node


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(action: Callable[[], object], device: torch.device, repeats: int = 5) -> list[float]:
    """Wall times of an action after one warm-up."""
    action()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return times


def median_seconds(action: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    return statistics.median(wall_seconds(action, device, repeats))


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product on random data, the fastest of 20: a peak is what nothing disturbed."""
    side = 8192 if device.type == "cuda" else 3072
    left, right = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    return 2 * side**3 / min(wall_seconds(lambda: left @ right, device, 20))


def unet_flops(model: DiffusionModel) -> int:
    """Floating-point operations of the UNet for one image and one denoising step."""
    latents = torch.randn(1, *model.latent_shape, device=model.device)
    text = model.encode_prompts(["a tree image"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.unet_output(latents, torch.tensor(500, device=model.device), text)
    return counter.get_total_flops()


def bench_start() -> None:
    command = [str(Path(sys.executable).with_name("cu-run")), "--help"]
    seconds = median_seconds(lambda: subprocess.run(command, check=True, capture_output=True), torch.device("cpu"))
    print(f"cu-run --help: {seconds:.2f} s")


def bench_model(device: torch.device, precision: str, batch_size: int) -> None:
    node = read("model", "shapecanvas")
    sampler = Sampler(**node.pop("sampler"))
    transformers.utils.logging.disable_progress_bar()
    model = load_model(**node | {"precision": precision}, sampler=sampler, device=str(device))
    sequence = make_sequence(**read("sequence", "shapecanvas_style"))
    peak, flops = matmul_peak(device, precision), unet_flops(model)
    print(f"{device}, {precision}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    print(f"matrix product: {peak / 1e9:.0f} GFLOP/s; UNet: {flops / 1e9:.3f} GFLOP per image and step")

    concepts = [*sequence.targets, *sequence.retain]
    prompts = [sequence.evaluation_prompt(concept, cross) for concept in concepts for cross in sequence.cross_retain][:batch_size]
    seeds = [0] * len(prompts)
    seconds = median_seconds(lambda: list(generate(model, prompts, seeds, sampler, batch_size=batch_size, label="")), device, 3)
    rate = len(prompts) / seconds
    passes = sampler.steps * (2 if sampler.guidance != 1 else 1)
    print(
        f"sampling, batch {len(prompts)}, {sampler.steps} steps, guidance {sampler.guidance}: {rate:.1f} images/s, "
        f"{rate * passes * flops / peak:.0%} of the matrix product's rate"
    )

    params = select_parameters(model.unet, "kv_xattn")
    request = plan_requests(sequence, "sequential")[0]
    base = snapshot(params)
    anchors = lambda prompts, number: torch.randn(number, *model.latent_shape)  # noqa: E731, speed does not depend on them
    scope = Scope(model, sequence, request, params, base, base, RandomSource(0, 1), 8, 30, anchors)
    settings = TrainSettings(
        steps=30, optimizer="adamw", batch_size=8, lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=1.0
    )
    seconds = median_seconds(lambda: erase(scope, ConAbl(), {}, settings), device, 3) / settings.steps
    print(f"training, conabl, batch 8, fp32 weights: {1 / seconds:.1f} steps/s")


def time_method(plan: RunConfig, device: torch.device) -> tuple[float, int]:
    """Seconds per training step of a method, and the images that it has the untouched model make for one request."""
    method, model, sequence = plan.method.build(), plan.model.build(device=str(device)), plan.sequence.build()
    params, made = select_parameters(model.unet, method.params), {}
    base, request = snapshot(params), plan_requests(sequence, "sequential")[0]

    def anchors(prompts: list[str], number: int, mirrored: bool = False) -> torch.Tensor:
        made[tuple(prompts)] = number
        return torch.randn(number, *model.latent_shape, generator=torch.Generator().manual_seed(number))

    def seconds_of(steps: int) -> float:
        scope = Scope(model, sequence, request, params, base, base, RandomSource(0, 1), 8, steps, anchors)
        started = time.perf_counter()
        erase(scope, method, {}, dataclasses.replace(plan.spine.train, steps=steps))
        synchronize(device)
        seconds = time.perf_counter() - started
        assign(params, base)
        return seconds

    seconds_of(2)
    few, many = (statistics.median(seconds_of(steps) for _ in range(3)) for steps in (10, 40))
    return (many - few) / 30, sum(made.values())  # what a request prepares cancels out


def bench_methods(device: torch.device) -> None:
    """The cost of every method with its settings of conf/tuned, against ConAbl's in the same run."""
    names = sorted((path.stem for path in (CONF / "method").glob("*.yaml")), key=lambda name: name != "conabl")
    plans = {name: compose([f"method={name}"]) for name in names}
    timed = {name: time_method(plan, device) for name, plan in plans.items() if not plan.method.build().closed_form}
    for name, (seconds, images) in timed.items():
        ratio = seconds / timed["conabl"][0]
        print(f"{name:<16} {1000 * seconds:6.1f} ms a step, {ratio:4.1f} of conabl's; {images:>4} images made for a request")


def bench_main_job(overrides: list[str]) -> None:
    """The main job with empty caches, as a subprocess in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("cu-run")), *overrides, f"paths.outputs={folder}"]
        started = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"WANDB_MODE": "offline"})
        seconds = time.perf_counter() - started
        directory = Path(done.stdout.strip().splitlines()[-1].removeprefix("run: "))
        table = pd.read_csv(directory / "metrics.csv")
        first = yaml.safe_load((directory / "steps" / "01" / "step.json").read_text())["seconds"]["start_to_first_step"]
    requests = table[table["request"] > 0]
    per_request = (requests["train_seconds"] + requests["eval_seconds"]).median()
    print(
        f"cu-run {' '.join(overrides)}: {seconds:.0f} s for {len(requests)} requests, first training step after {first:.1f} s, "
        f"median request {per_request:.1f} s (training {requests['train_seconds'].median():.1f} s), "
        f"peak memory {table['peak_memory_mb'].max():.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--skip-main", action="store_true", help="leave the main job out")
    parser.add_argument("--methods", action="store_true", help="only the cost of a training step of every method")
    arguments = parser.parse_args()
    if arguments.methods:
        bench_methods(torch.device(arguments.device))
        return
    bench_start()
    bench_model(torch.device(arguments.device), arguments.precision, arguments.batch_size)
    if not arguments.skip_main:
        choice = [f"device={arguments.device}", f"model.precision={arguments.precision}"]
        bench_main_job(["method=conabl", "reg=gradproj", *choice])


if __name__ == "__main__":
    main()
