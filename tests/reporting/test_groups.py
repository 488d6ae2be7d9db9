"""The rows of a report: which runs stand together, their mean and interval, and what became of
those that are not finished.
"""

import json
import re
import textwrap
import types
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from matplotlib.figure import Figure
from runs_by_hand import make_run

from cu_runner.cli import report
from cu_runner.cli.console import logging_to
from cu_runner.reporting.page_data import drift_by_layer, drift_estimates
from cu_runner.reporting.page_groups import Group, contrast, group_runs, read_all
from cu_runner.reporting.page_plots import BAND, metric_panel, tradeoff_panel
from cu_runner.reporting.page_tables import by_request, seeds_by_request, summary
from cu_runner.reporting.unfinished import Outcome, outcome_of
from cu_runner.runtime.code_identity import identify
from cu_runner.schema.errors import TrainingError
from cu_runner.store.run_record import RunRecord, read_run
from cu_runner.sweeps.job_note import JobNote, write_note

pytestmark = pytest.mark.usefixtures("numbers_by_hand")


@pytest.fixture
def seeds(tmp_path) -> Group:
    """Three runs whose RA-I is 97, 96 and 95, and whose other numbers are the same."""
    (group,), lines = read_all([make_run(tmp_path, seed=seed) for seed in (2, 0, 1)])
    assert lines == []
    return group


# ------------------------------------------------------------------------------------ mean and band
def test_seeds_are_one_row_with_mean_and_interval(seeds):
    assert (seeds.label, seeds.seeds, [run.seed for run in seeds.runs]) == (
        "conabl",
        "0 to 2",
        [0, 1, 2],
    )
    found = seeds.at_end("RA_I")
    assert found.mean == 96.0
    assert found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    # Wilson's, of all 12 images on which it rests: wider, and cut at 100
    assert found.ends == pytest.approx((100 * 12 / (12 + 1.959964**2), 100.0), abs=1e-3)
    (row,) = summary([seeds]).rows
    texts = [f"{cell.text} {cell.below}".strip() for cell in row if not isinstance(cell, str)]
    assert texts[:4] == ["conabl", "3", "96.0 (74.2 to 99.0)", "96.0 (75.8 to 100.0)"]
    assert row[1] == "0 to 2"
    assert texts[-1] == "15.00 (15.00 to 15.00)"  # no share of images


def test_single_seeds_have_no_interval_and_stay_in_tables_of_their_own(seeds):
    alone = replace(seeds, runs=seeds.runs[1:2])
    assert alone.at_end("RA_I").half is None
    assert by_request([alone], "RA_I")[0].rows[0][1:] == ["99.0", "98.0", "97.0", "96.0"]
    assert seeds_by_request([alone], "RA_I") == []
    (table,) = seeds_by_request([seeds, alone], "RA_I")
    assert [row[1:] for row in table.rows] == [
        [str(seed), *(f"{100 - index - seed:.1f}" for index in range(4))] for seed in range(3)
    ]


def test_seeds_are_one_line_with_a_band_and_one_point_with_bars(seeds):
    alone = replace(seeds, number=1, runs=seeds.runs[:1])
    axes = Figure().subplots()
    metric_panel([seeds, alone], "RA_I", "")(axes)
    mean, single = axes.lines
    assert mean.get_ydata().tolist() == [99, 98, 97, 96]
    assert single.get_ydata().tolist() == [100, 99, 98, 97]
    (band,) = axes.collections
    assert band.get_alpha() == BAND
    low, high = band.get_paths()[0].get_extents().intervaly
    assert (low, high) == pytest.approx(
        (min(each.ends[0] for each in seeds.estimates["RA_I"]), 100)
    )
    axes = Figure().subplots()
    tradeoff_panel([seeds, alone], "RA_I")(axes)
    ends = [line.get_xydata().tolist() for line in axes.lines]
    x, y = seeds.at_end("UA"), seeds.at_end("RA_I")
    assert ends[:4] == [
        [[96, 96]],
        [[x.ends[0], 96], [x.ends[1], 96]],
        [[96, y.ends[0]], [96, y.ends[1]]],
        [[96, 97]],
    ]


def test_the_matrix_of_a_group_is_the_mean_of_its_seeds(seeds):
    assert len(seeds.accuracies) == 3
    seeds.accuracies[0].loc["old", 1] = 30.0
    assert seeds.accuracy.fillna(-1).loc["old"].tolist() == [100, 10, 0, 100]
    assert seeds.accuracy.fillna(-1).loc["new"].tolist() == [100, -1, 50, 50]
    assert [each.mean for each in drift_estimates(seeds).values()] == [9, 12]


# -------------------------------------------------------------------------------- what stands apart
def other_weights(run: RunRecord, part: str) -> RunRecord:
    return replace(run, records=[replace(each, **{part: "0" * 64}) for each in run.records])


def test_only_runs_that_differ_in_nothing_but_their_seed_stand_together(tmp_path):
    code = identify()
    other = replace(code, sha256="2" * 64, files=code.files | {"methods/base.py": "2"})

    def made(**options: object) -> RunRecord:
        return read_run(make_run(tmp_path, **{"finished": 1, "code": code} | options))

    first, second = made(), made(seed=1)
    assert group_runs([first, made(method="esd", seed=1)])[1:] != []
    apart = {
        "science": made(seed=2, science=1),
        "requests done": made(seed=3, finished=2),
        "code": made(seed=4, code=other),
        "weights of the model": other_weights(second, "model_sha256"),
        "weights of the evaluator": other_weights(second, "evaluator_sha256"),
        "what measures retention": other_weights(second, "retention_sha256"),
        "measured by": other_weights(second, "run_sha256"),
        "text files of settings": other_weights(second, "signature"),
    }
    assert group_runs([second, first]) == [[first, second]]
    for name, run in apart.items():
        grouped = group_runs([first, run])
        assert grouped == [[first], [run]]
        groups = [Group(i, str(i), runs, []) for i, runs in enumerate(grouped)]
        assert name in contrast(groups)
    same = replace(first, directory=Path("copy"))
    assert group_runs([first, same, second]) == [[first, second], [same]]
    alike = [Group(0, "0", [first], []), Group(1, "1", [same], [])]
    assert contrast(alike) == {}


# ----------------------------------------------------------------------------- what is not finished
def log_of(run: Path, error: BaseException | None) -> None:
    """Write what a run logs that ends with this error, or without a word."""
    with pytest.raises(type(error)), logging_to(run / "run.log"):
        raise error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TrainingError("a loss of 'nan'\nat request 1"), "failed: a loss of 'nan' at request 1"),
        (OSError(28, "No space left on device"), "failed: No space left on device"),
        (ZeroDivisionError(), "failed: ZeroDivisionError"),
        (ValueError(Path("x")), "failed: PosixPath('x')"),
        (ValueError("y" * 999), f"failed: {'y' * 397}..."),
        (ValueError("\x1b[31mred"), "failed: ?[31mred"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_what_a_log_says_of_the_end(tmp_path, error, expected):
    log_of(tmp_path, error)
    assert str(outcome_of(tmp_path, None)) == expected
    with (tmp_path / "run.log").open("a") as log:  # it was begun again, and killed
        log.write("2026-01-31 12:00:00,000 INFO cu_runner.runner.parts: smoke\n")
    assert str(outcome_of(tmp_path, None)) == "ended: its log breaks off after 'smoke'"


def test_what_a_sweep_says_of_the_end(tmp_path):
    assert outcome_of(tmp_path, None) == Outcome("ended", "no log")
    assert outcome_of(tmp_path, "no GPU") == Outcome("failed", "no GPU")


def test_runs_that_failed_stand_with_the_reason(call_command, outlined, tmp_path):
    """One that stopped in the middle, one without a step, and one without a directory."""
    run = make_run(tmp_path, finished=1)
    log_of(run, TrainingError("a loss of nan"))
    none = make_run(tmp_path, "esd", finished=0)
    (none / "steps/00/step.json").unlink()
    for number, note in enumerate(
        (
            JobNote(["cu-run", "method=esd"], None, run=str(none), error="no GPU here"),
            JobNote(["cu-run", "method=esdd"], None, error="no such method"),
        )
    ):
        (tmp_path / f"sweep/{number}").mkdir(parents=True)
        write_note(tmp_path / f"sweep/{number}/job.json", note)
    status, out, err = call_command(report.main, "cu-report", run, "sweep", "--output", "here")
    assert (status, err) == (0, "")
    said = [
        f"conabl (1 of 3 requests): failed: a loss of nan ({run.name})",
        f"Left out, since no step is finished: {none.name} (failed: no GPU here).",
        "Could not be run: cu-run method=esdd (no such method)",
    ]
    assert out.splitlines() == [*said, "report: here/index.html"]
    html = (tmp_path / "here/index.html").read_text()
    assert all(f'<p class="note">{line}</p>' in html for line in said)
    assert '1 of 3 <span class="below">failed</span>' in html
    status, _, err = call_command(report.main, "cu-report", none)
    assert (status, err.count("\n")) == (1, 1)
    assert f"no step is finished of {none.name} (ended: no log)" in err


# ----------------------------------------------------------------------------------- merged weights
def test_merged_weights_are_those_that_were_measured(call_command, outlined, tmp_path):
    """On the page and in the norms by layer; delta.safetensors is of the request alone."""
    run = make_run(tmp_path, merged=True)
    assert list(drift_by_layer(read_run(run)).values()) == [18.0, 24.0]
    assert call_command(report.main, "cu-report", run, "--output", "here")[0] == 0
    html = (tmp_path / "here/index.html").read_text()
    place = (run / "steps/03/merged.safetensors").relative_to(tmp_path)
    assert f"<dt>weights</dt><dd>{place}</dd>" in html
    assert json.loads((run / "steps/03/step.json").read_text())["row"]["drift_l2"] == 30.0


def test_the_page_takes_the_weights_that_were_measured(model, tmp_path):
    """Of a step with merge merged.safetensors, of every other one delta.safetensors."""
    text = (Path(__file__).parents[2] / "docs/run_directory.md").read_text(encoding="utf-8")
    (code,) = re.findall(r'(    weights = step / "merged.*?)\n\n', text, flags=re.DOTALL)
    name, base = next((name, each.clone()) for name, each in model.denoiser.named_parameters())
    pipeline = types.SimpleNamespace(unet=model.denoiser)
    place = {"step": tmp_path, "pipeline": pipeline, "safetensors": safetensors}
    for file, change in (("delta.safetensors", 1.0), ("merged.safetensors", 2.0)):
        safetensors.torch.save_file({name: torch.full_like(base, change)}, tmp_path / file)
        before = model.denoiser.get_parameter(name).clone()
        exec(textwrap.dedent(code), dict(place))
        assert torch.equal(model.denoiser.get_parameter(name), before + change)
