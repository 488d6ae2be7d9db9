"""Measure what a user waits for: start-up, images/s, steps/s, memory, a request, the main job.

`make bench`.

    python scripts/bench.py                       # the embedded model and the main job
    python scripts/bench.py --skip-main           # without the main job
    python scripts/bench.py --skip-main --levers  # and each lever of speed with and without
    python scripts/bench.py --methods             # what a training step of every method costs
    python scripts/bench.py --model sd15 --path DIR --precision bf16 --batch-size 32 \\
                            --levers --compile
    python scripts/bench.py --model sdxl --path DIR --precision bf16 --batch-size 2 \\
                            --train-batch-size 1 --gradient-checkpointing
    python scripts/bench.py --request experiment=unlearncanvas_style model.path=DIR \\
                            evaluator.paths.style=DIR/classifiers/style \\
                            evaluator.paths.object=DIR/classifiers/object

Without --device it is the fastest device there is. DIR is one that scripts/make_random_pipeline.py
wrote, or a checkpoint. Further settings are given as to cu-run. A --request is made by cu-run
itself, with empty caches and the whole sequence, and stopped when its first request is committed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_levers import bench_levers
from bench_model import bench_accuracy, bench_model, load, wall_seconds

from cu_runner.cli.console import Parser, quiet_libraries, whole_number
from cu_runner.cli.failures import one_line_failures
from cu_runner.config.command import last_of_each
from cu_runner.config.compose import compose
from cu_runner.models.diffusion import DTYPES
from cu_runner.runner.forecast import work_of
from cu_runner.runtime.devices import choose_device, limit_threads
from cu_runner.runtime.paths import config_dir
from cu_runner.store.layout import STEP
from cu_runner.store.run_record import RunRecord, read_run
from cu_runner.sweeps.make_runs import CU_RUN

ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
]
ACCELERATE += ["--dynamo_backend", "no", "--main_process_port", "0"]


def choices(group: str) -> list[str]:
    """Return the files of a configuration group."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def bench_start() -> None:
    seconds = sorted(
        wall_seconds(
            lambda: subprocess.run([CU_RUN, "--help"], check=True, capture_output=True),
            torch.device("cpu"),
            5,
        )
    )
    print(f"cu-run --help: {seconds[2]:.2f} s", flush=True)


def run_in(
    folder: str, overrides: list[str], processes: int = 1, last: int | None = None
) -> tuple[RunRecord, float]:
    """Make a run by the command with empty caches; return it and its seconds.

    Args:
        processes: how many accelerate launches, one per GPU.
        last: stop the run when this step is committed; None lets it end.

    Raises SystemExit, with the status of cu-run and after what it said, when it fails.
    """
    overrides = [*overrides, f"paths.outputs={folder}"]
    directory, said = compose(overrides).directory, Path(folder) / "stderr"
    committed = directory / "steps" / f"{last:02d}" / STEP if last is not None else None
    command = (
        [CU_RUN]
        if processes == 1
        else [*ACCELERATE, "--num_processes", str(processes), "-m", "cu_runner.cli.run"]
    )
    environment = os.environ | {"WANDB_MODE": "offline"}
    started = time.perf_counter()
    with (
        said.open("w") as errors,
        subprocess.Popen(
            [*command, *last_of_each(overrides)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
        ) as process,
    ):
        while process.poll() is None and not (committed and committed.exists()):
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        process.terminate()
    if process.returncode and not (committed and committed.exists()):
        sys.stderr.write(said.read_text())
        sys.exit(process.returncode)
    return read_run(directory), seconds


def bench_request(overrides: list[str], processes: int) -> None:
    """Measure the first request of a run, and print what the whole run would take at its rates."""
    work = work_of(compose(overrides))
    with tempfile.TemporaryDirectory() as folder:
        all_of_them = [word for word in overrides if not word.startswith("eval.every=")]
        run, seconds = run_in(folder, all_of_them, processes, last=1)
        base, request = (record.row.flat() for record in run.records[:2])
        before, images = len(run.predictions(0)), len(run.predictions(1))
    start = seconds - base["eval_seconds"] - request["train_seconds"] - request["eval_seconds"]
    print(
        f"one request of {' '.join(overrides)}: start-up {start:.1f} s; {before} images of the "
        "untouched model, sampled and classified, in "
        f" {base['eval_seconds']:.1f} s; {request['train_steps']} training steps "
        "and anchor images in "
        f"{request['train_seconds']:.1f} s; {images} images in {request['eval_seconds']:.1f} s; "
        f"peak memory {request['peak_memory_mb']} MB"
    )
    evaluation = request["eval_seconds"] / images * sum(entry.images for entry in work)
    total = start + evaluation + request["train_seconds"] * (len(work) - 1)
    print(
        f"all {len(work) - 1} requests, projected from one measured request: {total / 60:.1f} min"
    )


def bench_methods(names: list[str], overrides: list[str], device: str) -> None:
    """Print the cost of methods with their settings of conf/tuned, against ConAbl's in this run.

    Without names those of all methods.
    """
    ours = None
    for name in dict.fromkeys(["conabl", *(names or choices("method"))]):
        bench = load([*overrides, f"method={name}"], device)
        if bench.method.closed_form:
            continue
        seconds = bench.step_seconds(15, 45)  # 15: more than any method's warm-up
        ours = ours or seconds
        images = bench.train(1)[1]
        said = (
            f"{1000 * seconds:6.1f} ms a step, {seconds / ours:4.1f} of conabl's; {images:>4} "
            "images made for a request"
        )
        print(f"{name:<16} {said}", flush=True)


def bench_main_job(overrides: list[str]) -> None:
    """Time the main job with empty caches, as a subprocess in a folder of its own."""
    overrides = ["method=conabl", "reg=gradproj", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        run, seconds = run_in(folder, overrides)
    first = run.records[1].seconds["start_to_first_step"]
    requests = run.table[run.table["request"] > 0]
    per_request = (requests["train_seconds"] + requests["eval_seconds"]).median()
    print(
        f"cu-run {' '.join(overrides)}: {seconds:.0f} s for {len(requests)} requests, first "
        f"training step after {first:.1f} s, "
        f"median request {per_request:.1f} s (training "
        f"{requests['train_seconds'].median():.1f} s), "
        f"peak memory {run.table['peak_memory_mb'].max():.0f} MB"
    )


def read_arguments() -> argparse.Namespace:
    parser = Parser(prog="bench.py", description=__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="further settings, as cu-run takes them"
    )
    parser.add_argument(
        "--model", choices=choices("model"), help="a file of conf/model; shapecanvas without it"
    )
    parser.add_argument(
        "--path", help="of its weights; scripts/make_random_pipeline.py writes some"
    )
    parser.add_argument("--device", help="auto (a GPU if there is one), cpu, cuda, cuda:1")
    parser.add_argument("--precision", choices=list(DTYPES))
    parser.add_argument("--batch-size", type=whole_number, help="images that are sampled together")
    parser.add_argument("--train-batch-size", type=whole_number, help="images per training step")
    parser.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations twice: less memory",
    )
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument(
        "--levers", action="store_true", help="also each lever of speed, with and without"
    )
    parser.add_argument("--skip-main", action="store_true", help="leave the main job out")
    parser.add_argument(
        "--methods",
        nargs="*",
        metavar="METHOD",
        help="only the cost of a training step, of every method or these",
    )
    parser.add_argument(
        "--request",
        action="store_true",
        help="only one request of such a run, and the whole projected from it",
    )
    parser.add_argument(
        "--processes", type=whole_number, default=1, help="with --request: GPUs, one process each"
    )
    arguments = parser.parse_intermixed_args()
    wrong = [entry for entry in arguments.overrides if "=" not in entry]
    if wrong:
        parser.error(f"{wrong[0]!r} is no setting; they are KEY=VALUE, as cu-run takes them")
    unknown = [name for name in arguments.methods or [] if name not in choices("method")]
    if unknown:
        parser.error(
            f"--methods {unknown[0]}: no such file in conf/method; allowed: "
            f"{', '.join(choices('method'))}"
        )
    return arguments


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """Return the options as settings of cu-run, before those that are given as such."""
    options = {
        "model": arguments.model,
        "model.path": arguments.path,
        "device": arguments.device,
        "model.precision": arguments.precision,
        "eval.batch_size": arguments.batch_size,
        "train.batch_size": arguments.train_batch_size,
        "train.gradient_checkpointing": arguments.gradient_checkpointing or None,
        "speed.compile": arguments.compile or None,
    }
    return [
        f"{key}={value}" for key, value in options.items() if value is not None
    ] + arguments.overrides


def main() -> None:
    arguments = read_arguments()
    overrides = settings_of(arguments)
    with one_line_failures("bench.py"):
        plan = compose(overrides)
        if arguments.request:
            bench_request(overrides, arguments.processes)
            return
        quiet_libraries()
        device = choose_device(plan.spine)
        limit_threads(plan.spine.num_threads)
        if arguments.methods is not None:
            bench_methods(arguments.methods, overrides, device)
            return
        bench_start()
        bench_model(overrides, device)
        embedded = arguments.model in (None, "shapecanvas")
        if embedded:
            bench_accuracy(overrides, device)
        if arguments.levers:
            bench_levers(overrides, device)
        if embedded and not arguments.skip_main:
            bench_main_job(overrides)


if __name__ == "__main__":
    main()
