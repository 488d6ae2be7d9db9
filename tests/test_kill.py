"""kill -9 at two dozen random moments of a two-request run: what comes out is bitwise what an undisturbed run makes."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import SMOKE, environment

KILLS = 24
OVERRIDES = [*SMOKE, "train.steps=6", "reg=[l2,gradproj]", "reg.gradproj.apply=update", "reg.gradproj.auxiliary.number=20"]
MEASURED = ["train_seconds", "eval_seconds", "peak_memory_mb"]  # the only columns that may differ


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the driver saw, and the directory it worked in."""
    cwd = tmp_path_factory.mktemp("kill")
    arguments = json.dumps({"overrides": OVERRIDES, "kills": KILLS, "requests": 2, "seed": 20})
    driver = Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), arguments], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), cwd


def runs(cwd: Path, name: str) -> Path:
    (directory,) = (cwd / name / "runs" / "smoke").iterdir()
    return directory


def test_the_kills_hit_every_stage(report):
    kills = [kill for kill in report[0]["kills"] if kill["killed"]]
    assert len(kills) >= 20
    assert {kill["from"] for kill in kills} >= {0, 1, 2}
    assert any(kill["partial"] for kill in kills)


def test_deltas_and_predictions_are_bitwise_those_of_an_undisturbed_run(report):
    found, cwd = report
    calm = runs(cwd, "calm")
    for number in range(found["runs"]):
        killed = runs(cwd, f"killed{number}")
        assert killed.name == calm.name
        for file in ("steps/01/delta.safetensors", "steps/02/delta.safetensors"):
            assert (killed / file).read_bytes() == (calm / file).read_bytes(), file
        for index in range(3):
            for file in ("predictions.csv", "metrics.json", "grid.png"):
                assert (killed / f"steps/0{index}" / file).read_bytes() == (calm / f"steps/0{index}" / file).read_bytes(), file
        chains = [json.loads((directory / "steps/02/step.json").read_text())["sha256"] for directory in (calm, killed)]
        assert chains[0] == chains[1]


def test_metrics_are_those_of_an_undisturbed_run(report):
    found, cwd = report
    calm = pd.read_csv(runs(cwd, "calm") / "metrics.csv").drop(columns=MEASURED)
    assert len(calm) == 3
    for number in range(found["runs"]):
        killed = pd.read_csv(runs(cwd, f"killed{number}") / "metrics.csv").drop(columns=MEASURED)
        pd.testing.assert_frame_equal(calm, killed, check_exact=True)


def test_nothing_is_left_behind(report):
    found, cwd = report
    names = {path.name for path in runs(cwd, "calm").rglob("*")}
    for number in range(found["runs"]):
        assert {path.name for path in runs(cwd, f"killed{number}").rglob("*")} == names
