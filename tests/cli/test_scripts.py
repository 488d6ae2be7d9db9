"""Every command as its installed script, in two processes of its own: one that does its work and
one that cannot. Elsewhere commands are forks of one warm process, which skips their start.
"""

import pytest
import yaml
from commands import run_script
from conftest import SMOKE

from cu_runner.store.layout import JOB, SWEEP
from cu_runner.sweeps.job_note import JobNote, SweepNote, write_note

TABLE = {
    "title": "after the last request",
    "metrics": ["UA"],
    "rows": {"sequential": ["reg=none"]},
    "experiments": {
        "smoke": {
            "model": "ShapeCanvas",
            "methods": {"ConAbl": ["method=conabl"]},
            "columns": {"style": list(SMOKE)},
        }
    },
}


@pytest.mark.parametrize(
    ("command", "arguments", "last"),
    [
        ("cu-table", ["mine.yaml"], "table: outputs/tables/mine-smoke.md"),
        ("cu-report", ["RUN"], "report: outputs/reports/RUN/index.html"),
        ("cu-eval", ["RUN"], "evaluation: "),
        ("cu-export", ["RUN", "mine", "--to", "delta"], "export: mine"),
        ("cu-doctor", ["RUN"], "26 checks, all well"),
        ("cu-sweep", ["status", "sweep"], "1 jobs: 1 done"),
    ],
)
def test_a_script_does_its_work(command, arguments, last, run_copy, tmp_path):
    run = run_copy.relative_to(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TABLE))
    (tmp_path / "sweep/0").mkdir(parents=True)
    write_note(tmp_path / "sweep" / SWEEP, SweepNote(["cu-run", "-m"], None, "basic"))
    write_note(tmp_path / "sweep/0" / JOB, JobNote(["cu-run", *SMOKE], None, run=str(run_copy)))
    words = [word.replace("RUN", str(run)) for word in arguments]
    done = run_script(command, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert last.replace("RUN", run.name) in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("cu-table", ["nope"]),
        ("cu-report", ["outputs"]),
        ("cu-eval", ["outputs"]),
        ("cu-export", ["outputs", "mine", "--to", "delta"]),
        ("cu-doctor", ["train.stepss=3"]),
        ("cu-sweep", ["status", "outputs"]),
    ],
)
def test_a_script_that_cannot_says_so_in_one_line(command, arguments, tmp_path):
    (tmp_path / "outputs").mkdir()
    done = run_script(command, *arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert done.stderr.startswith(f"{command}: ")
    assert done.stderr.count("\n") == 1
