"""scripts/bench.py: every mode on something small, and bad input in one line."""

import importlib
import re
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest
import torch
from commands import Forked
from conftest import SMOKE

from cu_runner.sweeps.make_runs import CU_RUN

SCRIPTS = Path(__file__).parents[2] / "scripts"
RATES = r"[\d.]+ images/s, \d+% of the matrix product's rate"


@pytest.fixture
def bench(call_command, monkeypatch):
    """Returns run(*arguments) -> (exit status, lines of stdout, stderr) of the script in this
    process.
    """
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("bench")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    models = importlib.import_module("bench_model")
    monkeypatch.setitem(models.SIDES, "cpu", 256)
    step_seconds = models.Bench.step_seconds
    monkeypatch.setattr(models.Bench, "step_seconds", lambda made, *_: step_seconds(made, 2, 10))

    def run(*arguments: object) -> tuple[int, list[str], str]:
        status, out, err = call_command(module.main, "bench.py", *arguments)
        return status, out.splitlines(), err

    return run


class Run(Forked):
    """The run that the script starts, as a fork, with what the script uses of subprocess.Popen."""

    def __init__(self, command: list[str], *, stderr: TextIO, env: dict[str, str], **_: object):
        assert command[0] == CU_RUN
        super().__init__("cu-run", *command[1:], cwd=Path.cwd(), env=env)
        self._errors = stderr

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._errors.write(self.communicate()[1])

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


@pytest.fixture
def forked(bench, monkeypatch):
    """Runs of the script are forks."""
    monkeypatch.setattr("bench.subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Run}))


def number(pattern: str, line: str) -> float:
    found = re.search(pattern, line)
    assert found, line
    return float(found[1])


@pytest.mark.slow
def test_a_request_is_measured_with_the_whole_sequence_and_the_rest_projected(bench):
    """12 images of the untouched model: its two targets and its retained concept; 8 after request
    1.
    """
    status, (one, whole), err = bench(
        "--request", *SMOKE, "sequence.seeds=[1,2]", "sequence.retain=[lava flow]"
    )
    assert (status, err) == (0, "")
    assert "12 images of the untouched model, sampled and classified, in " in one
    assert "; 3 training steps and anchor images in " in one
    assert "; 8 images in " in one
    assert number(r"peak memory (\d+) MB", one) > 100
    assert number(r"^all 2 requests, projected from one measured request: ([\d.]+) min$", whole) > 0
    assert number(r"start-up ([\d.]+) s", one) / 60 < number(r": ([\d.]+) min", whole) + 0.1


@pytest.mark.slow
def test_a_request_of_celebrities_with_random_judges(
    bench, forked, random_pipeline, pipelines, tmp_path
):
    """Its sequence names anchors; its judges are a classifier, open_clip, and a detector that finds
    a face in every image.
    """
    judges = tmp_path / "judges"
    random_pipeline.make_classifiers(judges, "celebrity", tiny=True)
    paths = [f"evaluator.paths.{domain}={judges / domain}" for domain in ("celebrity", "scene")]
    faces = f"evaluator.faces={{path: {judges / 'faces'}, domain: celebrity}}"
    small = [
        "model.resolution=64",
        "eval.steps=1",
        "eval.batch_size=12",
        "anchors.steps=2",
        "train.steps=1",
        "num_threads=1",
    ]
    small += ["sequence.cross_retain=[on a red carpet]", "wandb.mode=disabled"]
    chosen = (
        "experiment=celebrity_sdxl",
        f"model.path={pipelines['sdxl']}",
        "model.precision=bf16",
    )
    status, lines, err = bench("--request", *chosen, *paths, faces, *small)
    assert (status, err) == (0, "")
    assert "12 images of the untouched model" in lines[0]
    assert "; 7 images in " in lines[0]
    assert lines[1].startswith("all 6 requests, projected from one measured request: ")


TINY = ("model.resolution=64", "model.sampler.steps=2", "sequence=smoke", "train.batch_size=1")


def model_lines(lines: list[str]) -> None:
    """What is said of a model, line by line."""
    assert (
        number(r"^matrix product: (\d+) GFLOP/s; UNet: [\d.]+ GFLOP per image and step$", lines[0])
        > 0
    )
    assert (
        number(
            r"^diffusers' own loop, batch 1, fp32, untouched model: ([\d.]+) images/s$", lines[1]
        )
        > 0
    )
    assert number(rf"^sampling with .*: {RATES}, ([\d.]+) times diffusers' loop$", lines[2]) > 0
    assert (
        number(
            (
                r"^training with .*: [\d.]+ steps/s, ([\d.]+) GFLOP per step, \d+% of the "
                r"matrix product's rate$"
            ),
            lines[3],
        )
        > 0
    )
    assert number(r"^peak memory of the process, all of this together: (\d+) MB$", lines[4]) > 100


@pytest.mark.slow
def test_a_model_as_a_run_has_it_against_the_untouched_one(bench, pipelines):
    saving = ("--train-batch-size", 2, "--gradient-checkpointing")
    status, lines, err = bench(
        "--model", "sd15", "--path", pipelines["sd15"], "--precision", "bf16", *saving, *TINY[:-1]
    )
    assert (status, err) == (0, "")
    assert lines[0].startswith("cu-run --help: ")
    assert ", bf16, torch " in lines[1]
    model_lines(lines[2:])
    assert lines[4].startswith("sampling with kv_cache: batch 8, 2 steps, guidance 7.5: ")
    assert ": conabl, batch 2, bf16 passes, fp32 weights, activations computed twice: " in lines[5]


@pytest.mark.slow
def test_the_fast_path_is_judged_beside_plain_fp32(bench):
    """The embedded model; its lines stand before those of the levers and of the main job."""
    status, lines, err = bench("--skip-main", *TINY, "model.sampler.steps=6")
    assert (status, err) == (0, "")
    model_lines(lines[2:])
    for domain, line in zip(("style", "object"), lines[7:], strict=True):
        share = number(
            (
                rf"^accuracy, {domain}, 8 images: plain fp32 [\d.]+% .*; bf16 with kv_cache "
                rf"([\d.]+)%, (?:in|OUT)side it$"
            ),
            line,
        )
        assert share > 50


def test_the_first_phase_on_a_gpu_has_a_peak(bench, monkeypatch):
    """What has not been used yet has no peak to reset: CUDA is begun first."""
    models, begun = importlib.import_module("bench_model"), []

    def reset(device: torch.device) -> None:
        assert begun, "RuntimeError: Invalid device argument"

    monkeypatch.setattr(torch.cuda, "init", lambda: begun.append(True))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(models, "peak_memory_mb", lambda device: 7.0)
    peaks = models.Peaks(torch.device("cuda"))
    with peaks.phase("loading"):
        pass
    assert str(peaks) == "peak memory: loading 7 MB"


def test_work_is_counted_both_ways_and_per_step(bench, pipelines):
    """The frozen part behind the first trained layer costs a forward pass twice and a backward pass
    once; so does each image.
    """
    module, work = importlib.import_module("bench_model"), {}
    for batch in (1, 2):
        made = module.load(
            [
                "model=sd15",
                f"model.path={pipelines['sd15']}",
                *TINY[:-1],
                f"train.batch_size={batch}",
            ],
            "cpu",
        )
        work[batch] = made.step_flops()
    assert work[2] == pytest.approx(2 * work[1], rel=0.01)
    assert 3 < work[1] / made.image_flops() < 4.5
    base = [parameter.clone() for parameter in made.params.values()]
    made.train(2)
    assert all(one.equal(two) for one, two in zip(base, made.params.values(), strict=True))


@pytest.mark.slow
def test_every_lever_with_and_without(bench, pipelines):
    status, lines, err = bench(
        "--model", "sd15", "--path", pipelines["sd15"], "--precision", "bf16", "--levers", *TINY
    )
    assert (status, err) == (0, "")
    found = [line for line in lines if line.startswith("lever, ")]
    for what in (
        "batch of 8 in place of 1",
        "kv_cache",
        "fused attention",
        "gradients of the trained weights alone",
    ):
        assert sum(f": {what}: " in line for line in found) >= 1
    assert all(
        re.search(r": [\d.]+ (images|steps)/s, without [\d.]+: [\d.]+ times$", line)
        for line in found
    )
    assert len(found) == 10  # 8, and bf16 in sampling and in training; the others are of a GPU


def test_the_cost_of_a_method(bench):
    status, lines, err = bench(*TINY, "--methods", "conabl", "uce")
    assert (status, err) == (0, "")
    (line,) = lines  # uce has no steps
    assert re.match(
        r"^conabl +[\d.]+ ms a step, +1.0 of conabl's; +\d+ images made for a request$", line
    )


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (
            ("--request", "sequence=smoke", "model.path=/nope"),
            2,
            "cu-run: /nope: no such file or directory; give a local ",
        ),
        (
            ("--request", "sequence=nope"),
            2,
            "bench.py: sequence=nope: no such file in conf/sequence; allowed: ",
        ),
        (
            ("--model", "nope"),
            2,
            "bench.py: argument --model: invalid choice: 'nope' (choose from ",
        ),
        (
            ("--batch-size", "0"),
            2,
            "bench.py: argument --batch-size: '0' is not a whole number from 1 on; ",
        ),
        (
            ("--device", "gpu"),
            2,
            "bench.py: device='gpu': allowed: auto, cpu, cuda, or cuda:1 and so on",
        ),
        (
            ("--methods", "conabl", "nope"),
            2,
            "bench.py: --methods nope: no such file in conf/method; allowed: conabl, ",
        ),
        (("smoke",), 2, "bench.py: 'smoke' is no setting; they are KEY=VALUE"),
        (
            ("--model", "unlearncanvas"),
            2,
            "bench.py: not set, and without a default: model.path; add model.path=",
        ),
        (
            ("--model", "sd15", "--path", "/nope"),
            2,
            "bench.py: /nope: no such file or directory; give a local ",
        ),
    ],
)
def test_bad_input_is_one_line(bench, forked, arguments, status, line):
    found, _, err = bench(*arguments)
    assert (found, err.count("\n")) == (status, 1)
    assert err.startswith(line)


@pytest.mark.parametrize("kind", ["sd3_medium", "flux_dev"])
def test_a_transformer_in_miniature(bench, transformers_on_disk, kind):
    chosen = ["--model", kind, "--path", transformers_on_disk[kind], "--precision", "fp32"]
    small = ["sequence=smoke", "model.resolution=64", "model.sampler.steps=1", "num_threads=1"]
    small += ["--batch-size", 2, "--train-batch-size", 1, "method.num_anchors=1"]
    status, lines, err = bench(*chosen, *small)
    assert (status, err) == (0, "")
    assert any("; transformer: " in line and "GFLOP per image and step" in line for line in lines)
    assert any(line.startswith("sampling with no lever: batch 2, 1 steps") for line in lines)
    assert any(line.startswith("training with no lever: conabl, batch 1") for line in lines)


@pytest.mark.parametrize("kind", ["sd3_medium", "flux_dev"])
def test_one_block(monkeypatch, capsys, kind):
    """Narrower than published: those take minutes."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("bench_block")
    monkeypatch.setitem(module.TOKENS, kind, 8)
    monkeypatch.setitem(module.SIZES, kind, (2, 128))
    arguments = ["bench_block.py", kind, "--precision", "fp32", "--resolution", "64", "--steps=2"]
    monkeypatch.setattr("sys.argv", [*arguments, "--device", "cpu"])
    module.main()
    first, second, third = capsys.readouterr().out.splitlines()
    assert f"{kind}: one block, " in first
    assert "16 tokens of an image, 8 of a text" in first
    assert number(r"forward and backward ([\d.]+) s", second) >= 0
    gradients = [number(r"gradient ([\d.e-]+);", line) for line in (second, third)]
    assert gradients[0] > 0
    assert gradients[1] == gradients[0]  # that of a step, not of all steps so far
