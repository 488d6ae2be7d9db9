"""kill -9 at random moments of a two-request run: what comes out is bitwise what an undisturbed run
makes.

A dozen in `make test`, half a dozen more in `make test-all`, two hundred in `make test-faults`; a
request's state is saved every other step.
"""

import json
from collections import Counter
from pathlib import Path

import kill_driver
import pandas as pd
import pytest
from commands import run_forked
from conftest import SMOKE

SHORT = [override for override in SMOKE if not override.startswith("train.steps")] + [
    "train.steps=6",
    "train.save_every=2",
]
PROJECTED = [
    *SHORT,
    "reg=[l2,gradproj]",
    "reg.gradproj.apply=update",
    "reg.gradproj.auxiliary.number=20",
]
MERGED = [*SHORT, "reg=merge"]
MEASURED = ["train_seconds", "eval_seconds", "peak_memory_mb"]  # the only columns that may differ


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((PROJECTED, 12), id="projected"),
        pytest.param((MERGED, 6), id="merged", marks=pytest.mark.slow),
        pytest.param(
            (PROJECTED, 100),
            id="projected-100",
            marks=[pytest.mark.faults, pytest.mark.timeout(3000)],
        ),
        pytest.param(
            (MERGED, 100), id="merged-100", marks=[pytest.mark.faults, pytest.mark.timeout(3000)]
        ),
    ],
)
def report(request, shared):
    """What the driver saw, the directory it worked in, how many kills were asked for."""
    overrides, kills = request.param

    def make(cwd: Path) -> dict:
        told = json.dumps({"overrides": overrides, "kills": kills, "requests": 2, "seed": kills})
        done = run_forked("kill_driver", told, cwd=cwd, main=kill_driver.main, timeout=3000)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return *shared(f"{request.param_index}_kills", make), kills


def runs(cwd: Path, name: str) -> Path:
    (directory,) = (cwd / name / "runs" / "smoke").iterdir()
    return directory


def test_the_kills_hit_every_stage(report, record_property, capsys):
    found, _, wanted = report
    phases = Counter(kill["phase"] for kill in found["kills"])
    with capsys.disabled():
        print(
            f"\n{len(found['kills'])} kills of {found['runs']} runs: "
            f"{', '.join(f'{n} {name}' for name, n in phases.items())}"
        )
    assert len(found["kills"]) == wanted
    assert {kill[end] for kill in found["kills"] for end in ("from", "to")} >= {
        0,
        1,
    }  # steps that were finished around a kill
    assert set(phases) >= {"training", "evaluation"}
    if wanted >= 100:
        assert set(phases) >= {"loading", "base evaluation", "cache writing", "commit"}
        assert any(kill["partial"] for kill in found["kills"])


def test_deltas_and_predictions_are_bitwise_those_of_an_undisturbed_run(report):
    found, cwd, _ = report
    calm = runs(cwd, "calm")
    steps = [path for path in sorted(calm.glob("steps/*/*")) if path.name != "step.json"]
    assert len(steps) >= 3 + 2 * 5
    for number in range(found["runs"]):
        killed = runs(cwd, f"killed{number}")
        assert killed.name == calm.name
        for file in steps:
            assert (killed / file.relative_to(calm)).read_bytes() == file.read_bytes(), file
        chains = [
            json.loads((directory / "steps/02/step.json").read_text())["sha256"]
            for directory in (calm, killed)
        ]
        assert chains[0] == chains[1]


def test_metrics_are_those_of_an_undisturbed_run(report):
    found, cwd, _ = report
    calm = pd.read_csv(runs(cwd, "calm") / "metrics.csv").drop(columns=MEASURED)
    assert len(calm) == 3
    for number in range(found["runs"]):
        killed = pd.read_csv(runs(cwd, f"killed{number}") / "metrics.csv").drop(columns=MEASURED)
        pd.testing.assert_frame_equal(calm, killed, check_exact=True)


def test_nothing_is_left_behind(report):
    found, cwd, _ = report
    names = {path.name for path in runs(cwd, "calm").rglob("*")}
    for number in range(found["runs"]):
        assert {path.name for path in runs(cwd, f"killed{number}").rglob("*")} == names
