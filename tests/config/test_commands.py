"""The command that config.yaml of a run records: it makes the run again, and stays one comment."""

import shlex
import subprocess

import pytest
import yaml
from conftest import run_directory
from hydra.core.hydra_config import HydraConfig

from cu_runner.cli import evaluate
from cu_runner.config.command import recorded_command, words_of
from cu_runner.config.compose import compose
from cu_runner.store.files import command_in, has_intact_header, hash_json
from cu_runner.store.run_directory import RunStore
from cu_runner.store.run_record import read_run

ODD = [
    "a\nb",
    "a\r# b",
    "it's\x07",
    "\\\t\x1b[0m",
    "\x85\u2028\u2029",
    "\u200b\U000e0001",
    "\u6f22 $x",
]


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "sequence=shapecanvas_style100",
            "reg=gradproj_l1",
            "seed=4",
            "reg.l1.weight=0.5",
            "++setting.stop_at=90",
        ],
        [
            "sequence.targets=[torch light,'a, \"b\"']",
            "method=esd",
            "reg=merge",
            "anchors.steps=3",
            "retention=shapecanvas",
        ],
        [
            "model=sd15",
            "model.path=/some where/x",
            "evaluator=shapecanvas_clip",
            "eval.guidance=3",
            "train.betas=[0.5,0.9]",
        ],
        [
            "experiment=unlearncanvas_style",
            "model.path=m",
            "evaluator.paths.style=s",
            "evaluator.paths.object=o",
            "reg=gradproj",
        ],
    ],
)
def test_a_recorded_command_makes_the_same_run(overrides):
    """Without what is no part of the experiment."""
    more = [
        "num_threads=2",
        "eval.batch_size=7",
        "paths.outputs=x",
        "wandb.mode=disabled",
        "train.save_every=5",
    ]
    plan = compose([*overrides, *more])
    program, *words = shlex.split(recorded_command("cu-run", words_of(HydraConfig.get())))
    assert (program, words) == ("cu-run", overrides)
    assert compose(words).signature == plan.signature


def test_permissions_are_recorded():
    words = ["allow_modules=[mine]", "++model.allow_pickle=[a.pt]", "device=cpu", "dry_run=true"]
    assert shlex.split(recorded_command("cu-run", words)) == ["cu-run", *words[:2]]


@pytest.mark.parametrize("word", ODD)
def test_no_character_breaks_out_of_the_comment(word, tmp_path):
    line = recorded_command("cu-run", [f"a={word}", "seed=1"])
    assert line.isprintable()
    environment = {"LC_ALL": "C.UTF-8"}
    back = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, env=environment
    )
    assert back.stdout.decode().split("\0") == ["cu-run", f"a={word}", "seed=1", ""]
    config = {"seed": 3}
    with RunStore(tmp_path / "run", config, hash_json, command=line):
        pass
    content = (tmp_path / "run/config.yaml").read_bytes()
    assert yaml.safe_load(content) == config
    assert has_intact_header(content)
    assert command_in(content.decode()) == line
    assert not has_intact_header(content.replace(b"seed=1", b"seed=2"))


def test_bytes_that_are_no_utf8_are_kept():
    assert recorded_command("cu-run", ["model.path=\udcff/x"]) == "cu-run $'model.path=\\xff/x'"


def test_a_job_of_a_sweep_records_its_own_command(in_process, tmp_path):
    for name in ("tree", "searched"):
        (tmp_path / name / "experiment").mkdir(parents=True)
        (tmp_path / name / f"experiment/{name}.yaml").write_text("# @package _global_\nseed: 7\n")
    trees = [f"--config-dir={tmp_path}/tree", f"hydra.searchpath=[file://{tmp_path}/searched]"]
    mine = [
        "allow_modules=[os]",
        "sequence=smoke",
        "train.steps=2",
        "train.batch_size=2",
        "method.num_anchors=2",
    ]
    machine = ["wandb.mode=disabled", "num_threads=1", "eval.batch_size=4"]
    status, out, err = in_process(
        "-m", *trees, "experiment=tree", *mine, "model.sampler.steps=1,2", *machine
    )
    assert (status, err) == (0, "")
    run = read_run(run_directory(out, tmp_path))
    assert shlex.split(run.command) == [
        "cu-run",
        *trees,
        "experiment=tree",
        *mine,
        "model.sampler.steps=2",
    ]
    status, out, _ = in_process(*shlex.split(run.command)[1:], "wandb.mode=disabled")
    assert (status, run_directory(out, tmp_path)) == (0, run.directory)
    assert "complete already; nothing to do" in out


def test_an_evaluation_has_its_cu_eval_command(run_copy, call_command):
    changes = ["eval.steps=3", "retention=shapecanvas", "retention.num_prompts=4"]
    call_command(evaluate.main, "cu-eval", run_copy, *changes, "device=cpu")
    (evaluation,) = (run_copy / "evaluations").iterdir()
    words = shlex.split(read_run(evaluation).command)
    assert words == ["cu-eval", str(run_copy), *changes]
    status, out, _ = call_command(evaluate.main, *words)
    assert (status, out.splitlines()[-1]) == (0, f"evaluation: {evaluation}")
