"""Two CPU processes as one: the metrics of a single process, and its deltas up to the order of
sums.
"""

import atexit
import re
import socket
import subprocess
from collections.abc import Callable
from types import SimpleNamespace

import accelerate
import accelerate.commands.launch
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from commands import Forked, environment, run_forked
from conftest import SMOKE, run_directory

from cu_runner.runtime import distributed

# --multi_gpu is what makes accelerate start more than one process, on CPUs too; with --cpu it
# starts a single one
ACCELERATE = [
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]
LAUNCH = [*ACCELERATE, "-m", "cu_runner.cli"]
CELLS = {
    "conabl, sgd": [  # Adam and clipping would hide gradients of another size
        "method.num_anchors=4",
        "reg=none",
        "train.optimizer=sgd",
        "train.lr=0.1",
        "train.grad_clip=0",
    ],
    "conabl": [
        "method.num_anchors=4",
        "reg=[l2,gradproj]",
        "reg.gradproj.apply=update",
        "reg.gradproj.auxiliary.number=20",
    ],
    "rgd": [
        "method=rgd",
        "method.num_images=4",
        "method.retain.images=4",
        "reg=none",
        "train.steps=2",
    ],  # products of two gradients
    "likelihood": [
        "method=likelihood",
        "method.draws=2",
        "method.sampling_steps=2",
        "method.retain.images=4",
        "method.dual.rounds=1",
        "method.dual.every=1",
        "reg=none",
        "train.steps=2",
        "train.batch_size=4",
    ],
}
# Keys of the embedded model's 4x4 layers: their gradients are of the size of rounding, and of those
# Adam makes steps as long as of any. With SGD they are compared too.
FAINT = re.compile(r"(mid_block|up_blocks\.0)\..*\.to_k\.")
COMMON = ["device=cpu", *(override for override in SMOKE if not override.startswith("method."))]


def together(overrides: tuple[str, ...]) -> list[str]:
    """COMMON, but for the keys that the overrides set."""
    keys = {override.partition("=")[0] for override in overrides}
    return [*(each for each in COMMON if each.partition("=")[0] not in keys), *overrides]


def launch(cwd, *overrides: str) -> subprocess.CompletedProcess:
    """Two processes of cu-run through accelerate, whose launcher is a fork."""
    return run_forked(
        "accelerate-launch",
        *LAUNCH,
        *together(overrides),
        cwd=cwd,
        env=environment(ACCELERATE_USE_CPU="true"),
        main=accelerate.commands.launch.main,
        timeout=400,
    )


def leave() -> None:
    """A process of a group that says at its end whether it is still in it."""
    atexit.register(lambda: print(f"at the end: {dist.is_initialized()}", flush=True))
    distributed.start("cpu")
    print(f"of two: {distributed.from_main(distributed.size)}", flush=True)


def fork_two(
    cwd, *overrides: str, main: Callable[[], None] | None = None
) -> subprocess.CompletedProcess:
    """Two forks of cu-run with the variables of accelerate's launcher; the outputs of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        Forked(
            "cu-run",
            *together(overrides),
            cwd=cwd,
            env=environment(**group, RANK=rank, LOCAL_RANK=rank),
            main=main,
        )
        for rank in "01"
    ]
    written = [process.communicate(timeout=400) for process in processes]
    out, err = ("".join(parts) for parts in zip(*written, strict=True))
    return subprocess.CompletedProcess(
        overrides, max(process.returncode for process in processes), out, err
    )


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            "cuda:0",
            "device=cuda:0: each of 4 processes has a GPU of its own; use device=cuda, auto or cpu",
        ),
        (
            "auto",
            (
                "device=auto: 3 processes and 2 CUDA devices; start at most one process for "
                "each, or use device=cpu"
            ),
        ),
        (
            "cuda",
            (
                "device=cuda: 3 processes and 2 CUDA devices; start at most one process for "
                "each, or use device=cpu"
            ),
        ),
    ],
)
def test_processes_without_a_gpu_of_their_own(monkeypatch, device, message):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # of them on this machine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=f"^{message}$"):
        distributed.start(device)


@pytest.mark.parametrize(
    ("device", "gpus", "cpu"),
    [("cpu", 4, True), ("auto", 4, False), ("cuda", 4, False), ("auto", 0, True), ("cpu", 0, True)],
)
def test_what_carries_the_group(monkeypatch, device, gpus, cpu):
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(
        accelerate,
        "PartialState",
        lambda cpu: asked.append(cpu) or SimpleNamespace(destroy_process_group=list),
    )
    distributed.start(device)
    assert asked == [cpu]


def test_alone_a_process_is_the_only_one():
    assert (distributed.rank(), distributed.size(), distributed.is_main()) == (0, 1, True)
    assert distributed.share(8) is None
    assert distributed.from_main(lambda: 3) == 3
    assert distributed.in_turn("a") == ["a"]
    assert distributed.any_of(True)
    assert not distributed.any_of(False)


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=[] if cell == "conabl, sgd" else pytest.mark.slow) for cell in CELLS],
)
def test_two_processes_make_what_one_makes(in_process, tmp_path, cell):
    status, out, err = in_process(*COMMON, *CELLS[cell], "paths.outputs=one")
    assert (status, err) == (0, "")
    one = run_directory(out, tmp_path)
    two_processes = launch if cell == "conabl, sgd" else fork_two
    done = two_processes(tmp_path, *CELLS[cell], "paths.outputs=two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run: ") == 2  # of one process: what it says first and last
    assert "2 processes" in done.stdout
    two = run_directory(done.stdout, tmp_path)
    assert two.name == one.name
    tables = [pd.read_csv(path / "metrics.csv") for path in (one, two)]
    names = ["request", "concept", "UA", "RA_I", "RA_C", "train_steps"]
    pd.testing.assert_frame_equal(tables[0][names], tables[1][names])
    for step in ("01", "02"):
        first, second = (
            safetensors.torch.load_file(path / "steps" / step / "delta.safetensors")
            for path in (one, two)
        )
        seen = [name for name in first if cell == "conabl, sgd" or not FAINT.search(name)]
        moved = torch.cat([first[name].flatten() for name in seen])
        apart = torch.cat([(second[name] - first[name]).flatten() for name in seen])
        assert apart.norm() < (1e-4 if cell == "conabl, sgd" else 1e-2) * moved.norm()
    zero = [(path / "steps/00/predictions.csv").read_bytes() for path in (one, two)]
    assert zero[0] == zero[1]


@pytest.mark.slow
def test_two_processes_probe_as_one_does(in_process, tmp_path):
    words = ["method=uce", "method.retain.prompts=20", "recovery=[paraphrase,relearning]"]
    words += ["recovery.paraphrase.prompts=paraphrases_shapecanvas_styles"]
    words += ["recovery.relearning.steps=[0,2]", "recovery.relearning.examples=2"]
    status, out, err = in_process(*COMMON, *words, "paths.outputs=one")
    assert (status, err) == (0, "")
    one = run_directory(out, tmp_path)
    done = fork_two(tmp_path, *words, "paths.outputs=two")
    assert done.returncode == 0, done.stderr
    two = run_directory(done.stdout, tmp_path)
    for step in ("01", "02"):
        first, second = (
            (path / "steps" / step / "recovery.csv").read_bytes() for path in (one, two)
        )
        assert first == second


def test_the_processes_leave_their_group_before_they_end(tmp_path):
    done = fork_two(tmp_path, main=leave)  # a group that is still there aborts one process of some
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["at the end: False"] * 2 + ["of two: 2"] * 2


def test_two_processes_resume_what_one_began_and_bad_input_is_one_line(run_copy, tmp_path):
    done = fork_two(tmp_path, "method.num_anchors=4", "reg=none", "train.lr=-1")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("cu-run: ")]
    assert set(lines) == {"cu-run: train.lr=-1: input should be greater than 0"}
    (run_copy / "steps/02/step.json").unlink()
    (run_copy / "summary.json").unlink()
    done = fork_two(tmp_path, "method.num_anchors=4")
    assert done.returncode == 0, done.stderr
    assert (run_copy / "steps/02/step.json").exists()
    assert "0/2" not in done.stdout  # the steps that one process had finished were not made again
