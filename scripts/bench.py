"""Measure what a user waits for: start-up, images/s, training steps/s, the main job. `make bench`.

    python scripts/bench.py                      # everything, on the fastest device there is
    python scripts/bench.py --skip-main          # without the main job
    python scripts/bench.py --methods            # what a training step of every method costs, and nothing else
    python scripts/bench.py --device cpu --precision bf16
    python scripts/bench.py --model sd15 --path DIR --precision bf16 --batch-size 32 --compile     # DIR: of make_random_pipeline.py
    python scripts/bench.py --request experiment=unlearncanvas_style model.path=DIR ...            # one request, and all projected

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

import diffusers
import torch
import transformers
import yaml
from torch.utils.flop_counter import FlopCounterMode

from cu_runner.concepts import make_sequence, plan_requests
from cu_runner.config import RunConfig, compose
from cu_runner.forecast import work_of
from cu_runner.methods.base import Scope
from cu_runner.methods.conabl import ConAbl
from cu_runner.models import DTYPES, DiffusionModel, load_model
from cu_runner.params import assign, select_parameters, snapshot
from cu_runner.provenance import device_name, peak_memory_mb
from cu_runner.runs import RunRecord, read_run
from cu_runner.sampling import generate, make_scheduler
from cu_runner.seeding import RandomSource
from cu_runner.settings import Sampler, Speed, TrainSettings
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


def bench_model(name: str, path: str | None, device: torch.device, precision: str, batch_size: int, compiles: bool) -> None:
    """Sampling and training of a model, every lever with and without, against the plain loop of diffusers."""
    node = read("model", name) | {"precision": precision} | ({"path": path} if path else {})
    sampler = Sampler(**node.pop("sampler"))
    transformers.utils.logging.disable_progress_bar()
    model = load_model(**node, sampler=sampler, device=str(device))
    sequence = make_sequence(**read("sequence", "shapecanvas_style" if name == "shapecanvas" else "unlearncanvas_style"))
    peak, flops = matmul_peak(device, precision), unet_flops(model)
    print(f"{name}, {device_name(device)}, {precision}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    print(f"matrix product: {peak / 1e9:.0f} GFLOP/s; UNet: {flops / 1e9:.3f} GFLOP per image and step")

    concepts = [*sequence.targets, *sequence.retain]
    prompts = [sequence.evaluation_prompt(concept, cross) for concept in concepts for cross in sequence.cross_retain][:batch_size]
    seeds, passes = [0] * len(prompts), sampler.steps * (2 if sampler.guidance != 1 else 1)

    def sample() -> list[torch.Tensor]:
        return list(generate(model, prompts, seeds, sampler, batch_size=batch_size, label=""))

    levers = {"nothing": Speed(False, False, False), "kv_cache": Speed(True, False, False)}
    levers |= {"kv_cache and channels_last": Speed(True, True, False)} if device.type == "cuda" else {}
    levers |= {"channels_last and compile": Speed(False, True, True)} if compiles else {}
    slowest = None
    for lever, speed in levers.items():
        model.speed_up(speed)
        rate = len(prompts) / median_seconds(sample, device, 3)
        slowest = slowest or rate
        print(
            f"sampling with {lever}: batch {len(prompts)}, {sampler.steps} steps, guidance {sampler.guidance}: "
            f"{rate:.2f} images/s, {rate * passes * flops / peak:.0%} of the matrix product's rate, "
            f"{rate / slowest:.2f} of that with nothing"
        )
    single = plain_rate(model, prompts[:4], sampler)
    print(f"diffusers' own loop, batch 1, fp32: {single:.2f} images/s; ours is {rate / single:.1f} times as fast")

    model.speed_up(Speed())
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
    print(f"peak memory of all this: {peak_memory_mb(device):.0f} MB")


def plain_rate(model: DiffusionModel, prompts: list[str], sampler: Sampler) -> float:
    """Images/s of diffusers' pipeline, one prompt after another in fp32, as the published scripts do it."""
    parts = model.components
    common = {"unet": parts.unet, "vae": parts.vae, "scheduler": make_scheduler(model, sampler)}
    if len(parts.tokenizers) == 2:
        (first, second), (encoder, larger) = parts.tokenizers, parts.text_encoders
        more = {"tokenizer": first, "tokenizer_2": second, "text_encoder": encoder, "text_encoder_2": larger}
        pipeline = diffusers.StableDiffusionXLPipeline(**common, **more)
    else:
        more = {"tokenizer": parts.tokenizers[0], "text_encoder": parts.text_encoders[0], "safety_checker": None}
        pipeline = diffusers.StableDiffusionPipeline(**common, **more, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": model.resolution, "width": model.resolution, "output_type": "pt"}
    single = lambda: [  # noqa: E731
        pipeline(prompt, num_inference_steps=sampler.steps, guidance_scale=sampler.guidance, **size) for prompt in prompts
    ]
    return len(prompts) / median_seconds(single, model.device, 3)


def bench_request(overrides: list[str]) -> None:
    """One request with empty caches, measured, and what the whole sequence would take at its rates."""
    plan = compose(overrides)
    first = plan.sequence.build().targets[0].name
    with tempfile.TemporaryDirectory() as folder:
        run = run_in(folder, [*overrides, f"sequence.targets=[{first}]"])[0]
    base, request = (record["row"] for record in run.records)
    images = len(run.predictions(1))
    work = work_of(plan)
    evaluation = request["eval_seconds"] / images * sum(entry.images for entry in work)
    total = evaluation + request["train_seconds"] * (len(work) - 1)
    print(
        f"one request of {' '.join(overrides)}: {request['train_steps']} steps and anchor images in "
        f"{request['train_seconds']:.0f} s, {images} images classified in {request['eval_seconds']:.0f} s, "
        f"the untouched model in {base['eval_seconds']:.0f} s, "
        f"peak memory {request['peak_memory_mb']} MB"
    )
    print(f"all {len(work) - 1} requests, projected from one measured request: {total / 60:.1f} min")


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

    seconds_of(15)  # more than any method's warm-up
    few, many = (statistics.median(seconds_of(steps) for _ in range(3)) for steps in (15, 45))
    return (many - few) / 30, sum(made.values())  # what a request prepares cancels out


def bench_methods(names: list[str], device: torch.device) -> None:
    """The cost of methods with their settings of conf/tuned, against ConAbl's in the same run; all of them without names."""
    known = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    ours = None
    for name in dict.fromkeys(["conabl", *(names or known)]):
        plan = compose([f"method={name}"])
        if plan.method.build().closed_form:
            continue
        seconds, images = time_method(plan, device)
        ours = ours or seconds
        said = f"{1000 * seconds:6.1f} ms a step, {seconds / ours:4.1f} of conabl's; {images:>4} images made for a request"
        print(f"{name:<16} {said}", flush=True)


def run_in(folder: str, overrides: list[str]) -> tuple[RunRecord, float]:
    """A run by the command with empty caches, and its seconds."""
    command = [str(Path(sys.executable).with_name("cu-run")), *overrides, f"paths.outputs={folder}"]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"WANDB_MODE": "offline"})
    return read_run(Path(done.stdout.strip().splitlines()[-1].removeprefix("run: "))), time.perf_counter() - started


def bench_main_job(overrides: list[str]) -> None:
    """The main job with empty caches, as a subprocess in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run, seconds = run_in(folder, overrides)
    first = run.records[1]["seconds"]["start_to_first_step"]
    requests = run.table[run.table["request"] > 0]
    per_request = (requests["train_seconds"] + requests["eval_seconds"]).median()
    print(
        f"cu-run {' '.join(overrides)}: {seconds:.0f} s for {len(requests)} requests, first training step after {first:.1f} s, "
        f"median request {per_request:.1f} s (training {requests['train_seconds'].median():.1f} s), "
        f"peak memory {run.table['peak_memory_mb'].max():.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapecanvas", help="a file of conf/model")
    parser.add_argument("--path", help="of its weights; scripts/make_random_pipeline.py writes some")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--skip-main", action="store_true", help="leave the main job out")
    parser.add_argument("--methods", nargs="*", metavar="METHOD", help="only the cost of a training step, of every method or these")
    parser.add_argument(
        "--request", nargs="+", metavar="OVERRIDE", help="only one request of such a run, and the whole projected from it"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.methods is not None:
        bench_methods(arguments.methods, device)
        return
    if arguments.request:
        bench_request(arguments.request)
        return
    bench_start()
    bench_model(arguments.model, arguments.path, device, arguments.precision, arguments.batch_size, arguments.compile)
    if not arguments.skip_main and arguments.model == "shapecanvas":
        choice = [f"device={arguments.device}", f"model.precision={arguments.precision}"]
        bench_main_job(["method=conabl", "reg=gradproj", *choice])


if __name__ == "__main__":
    main()
