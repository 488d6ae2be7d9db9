"""dry_run=true: the work by hand, rates from earlier runs only, the size of the weights, and that
nothing is touched.
"""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import SMOKE, read_conf

from cu_runner.concepts.requests import plan_requests
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.config.compose import compose
from cu_runner.models.parameters import select_parameters
from cu_runner.runner.forecast import (
    Rates,
    delta_bytes,
    disk_copies,
    measure_rates,
    plan_work,
    time_left,
    work_of,
)
from cu_runner.store.run_record import read_run

PLAN = ("sequence=shapecanvas_style", "dry_run=true", "wandb.mode=disabled")


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_work_of_the_three_settings():
    sequence = make_sequence(
        **read_conf("sequence/shapecanvas_style.yaml")
    )  # 12 + 12 styles, 8 objects, 2 seeds
    for setting, merges, last in (
        ("sequential", False, 384),
        ("independent", False, 208),
        ("independent", True, 384),
    ):
        work = plan_work(sequence, plan_requests(sequence, setting), 60, merges)
        assert [entry.request for entry in work] == list(range(13))
        assert (work[0].train_steps, work[0].images) == (0, 384)
        assert (work[1].train_steps, work[1].images) == (60, 208)
        assert work[12].images == last, (setting, merges)
    assert {
        entry.start
        for entry in plan_work(sequence, plan_requests(sequence, "simultaneous"), 60, False)[1:]
    } == {"base"}


def test_size_of_the_weights_without_loading_them(model):
    for group in ("kv_xattn", "xattn", "full"):
        expected = 4 * sum(
            parameter.numel() for parameter in select_parameters(model.denoiser, group).values()
        )
        assert delta_bytes("package:shapecanvas/weights/pipeline", None, group) == expected


def test_time_left():
    assert "training 50 s, evaluation 10 s" in time_left(100, 20, Rates(0.5, 0.5, 3), "cpu", "")
    assert time_left(100, 20, Rates(0.5, 0.5, 3), "cpu", "at most ").startswith(
        "at most about 1.0 min on cpu"
    )
    ends = "what ends requests early come on top"
    assert ends in time_left(100, 20, Rates(0.5, 0.5, 3), "cpu", "at most ")
    assert ends not in time_left(100, 20, Rates(0.5, 0.5, 3), "cpu", "")
    assert time_left(100, 20, Rates(None, 0.5, 3), "cpu", "").startswith(
        "unknown: no earlier run under outputs measured training"
    )
    assert time_left(0, 20, Rates(None, 0.5, 3), "cpu", "").startswith("about 0.2 min")
    assert "evaluation" in time_left(100, 20, Rates(0.5, None, 0), "cpu", "")


def test_rates_come_from_runs_of_the_same_kind(run_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = read_run(run_copy)
    device, table = run.records[0].device, run.table
    same = measure_rates(compose([*SMOKE, "seed=7"]), device)
    assert same.num_runs == 1
    per_step = sorted(table["train_seconds"][1:] / table["train_steps"][1:])
    assert same.step == pytest.approx(sum(per_step) / 2)
    images = sorted(table["eval_seconds"][index] / len(run.predictions(index)) for index in (1, 2))
    assert same.image == pytest.approx(sum(images) / 2)
    other_method = measure_rates(compose([*SMOKE[:3], "method=uce", *SMOKE[4:]]), device)
    assert (other_method.step, other_method.image) == (None, same.image)
    assert measure_rates(compose([*SMOKE, "model.sampler.steps=3"]), device) == Rates(None, None, 0)
    assert measure_rates(compose([*SMOKE, "num_threads=2"]), device) == Rates(None, None, 0)
    assert measure_rates(compose(list(SMOKE)), "another device") == Rates(None, None, 0)


def test_settings_that_are_no_part_of_the_experiment_do_not_hide_a_rate(
    run_copy, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    same = measure_rates(compose(list(SMOKE)), read_run(run_copy).records[0].device)
    changes = (
        "eval.batch_size=7",
        "+model.vae_slicing=true",
        "train.save_every=null",
    )
    assert measure_rates(compose([*SMOKE, *changes]), read_run(run_copy).records[0].device) == same


def test_runs_of_other_methods_do_not_hide_an_older_one(run_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, setting in enumerate(("method", "eval")):
        other = Path(
            shutil.copytree(run_copy, run_copy.with_name(f"{setting}-none-sequential-s0-00000000"))
        )
        config = yaml.safe_load((other / "config.yaml").read_text())
        config[setting] = (
            config[setting] | {"num_anchors": 5}
            if setting == "method"
            else config[setting] | {"steps": 3}
        )
        (other / "config.yaml").write_text(yaml.safe_dump(config))
        os.utime(other, (2e9 + number, 2e9 + number))  # newer
    monkeypatch.setattr("cu_runner.runner.forecast.SIMILAR_RUNS", 1)
    rates = measure_rates(compose(list(SMOKE)), read_run(run_copy).records[0].device)
    assert (rates.step is not None, rates.image is not None, rates.num_runs) == (True, True, 2)
    nothing = measure_rates(
        compose([*SMOKE[:3], "method=uce", *SMOKE[4:], "eval.steps=9"]),
        read_run(run_copy).records[0].device,
    )
    assert nothing == Rates(None, None, 0)


@pytest.mark.parametrize("damage", ["predictions", "empty", "num_threads", "train", "config"])
def test_a_run_that_is_damaged_or_of_another_version_measures_nothing(in_process, run_copy, damage):
    config = yaml.safe_load((run_copy / "config.yaml").read_text())
    if damage == "predictions":
        (run_copy / "steps/01/predictions.csv").unlink()
    elif damage == "empty":
        (run_copy / "steps/01/predictions.csv").write_text("step,seed\n")
    elif damage == "config":
        config["eval"] = 5
    else:
        del config[damage]
    (run_copy / "config.yaml").write_text(yaml.safe_dump(config))
    status, out, err = in_process(*SMOKE, "dry_run=true", "seed=5")
    assert (status, err) == (0, "")
    assert "time: unknown: no earlier run under outputs measured evaluation" in out


def test_the_retention_of_an_earlier_run_is_in_its_rate(run_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = compose([*SMOKE, "retention=shapecanvas", "retention.num_prompts=4"])
    run = read_run(run_copy)
    device, seconds = run.records[0].device, run.table["eval_seconds"]
    without = measure_rates(plan, device).image
    assert without == pytest.approx(
        sum(seconds[index] / len(run.predictions(index)) for index in (1, 2)) / 2
    )
    config = yaml.safe_load((run_copy / "config.yaml").read_text())
    (run_copy / "config.yaml").write_text(
        yaml.safe_dump(config | {"retention": plan.resolved["retention"]})
    )
    expected = sum(seconds[index] / (len(run.predictions(index)) + 4) for index in (1, 2)) / 2
    assert measure_rates(plan, device).image == pytest.approx(expected)
    assert (
        measure_rates(compose(list(SMOKE)), device).image is None
    )  # of another retention than the plan's


def test_copies_of_the_weights_on_the_disk():
    def copies(*overrides):
        plan = compose(["sequence=smoke", *overrides])  # 2 requests
        return disk_copies(plan, work_of(plan))

    assert copies("train.save_every=null") == 2
    assert copies("train.save_every=null", "setting=independent") == 4
    assert copies("train.save_every=null", "setting=simultaneous") == 4
    assert copies("train.save_every=null", "reg=merge") == 6
    assert (
        copies("train.save_every=10min") == 2 + 2 * 3
    )  # weights and two moments, and the file that takes its place
    assert copies("train.save_every=5", "train.optimizer=sgd") == 2 + 2


def test_a_dry_run_touches_nothing(in_process, tmp_path):
    status, out, err = in_process(*PLAN)
    assert (status, err) == (0, "")
    assert files_below(tmp_path) == []
    assert "12 plum 60 steps 384 images from the previous weights" in [
        " ".join(line.split()) for line in out.splitlines()
    ]
    assert (
        "to do: 13 of 13 evaluations, 720 training steps of batch 8, 3936 images (10 "
        "denoising steps, guidance 2.5)"
    ) in out
    assert "time: unknown: no earlier run under outputs measured evaluation" in out
    assert out.splitlines()[-1].startswith(
        "run: outputs/runs/shapecanvas_style/conabl-none-sequential-s0-"
    )


def test_a_dry_run_of_a_run_that_is_there(in_process, run_copy, tmp_path):
    before = files_below(tmp_path)
    status, out, err = in_process(*SMOKE, "dry_run=true")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"nothing to do: {run_copy.relative_to(tmp_path)} is complete"
    status, out, err = in_process(*SMOKE, "dry_run=true", "seed=5")
    assert (status, err) == (0, "")
    assert "time: about " in out
    assert files_below(tmp_path) == before


def test_a_dry_run_refuses_what_the_run_would_refuse(in_process, tmp_path):
    status, _, err = in_process(*PLAN, "model.path=gone")
    assert status == 2
    assert err.count("\n") == 1
    assert "gone: no such file or directory" in err
    assert in_process(*PLAN, "device=cuda:99")[0] == 2


def test_of_gates_the_new_target_alone_is_drawn():
    """Two concepts and two seeds: 2 images each; without gates 4 of retained ones, and 2 or 4."""
    for reg, images in (("gate", [8, 2, 2]), ("none", [8, 6, 8])):
        assert [
            each.images for each in work_of(compose(["sequence=smoke", f"reg={reg}"]))
        ] == images
