"""Trackers, told of a run by hand: what each writes, as it goes and after a resume; one that fails;
the group of conf/; a tracker of one's own in a run that is interrupted.
"""

import csv
import importlib.util
import io
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from commands import environment, run_script
from conftest import SMOKE, run_directory
from PIL import Image
from runs_by_hand import make_run
from wandb_records import read_facts_of_wandb
from wandb_server import WandbServer

from cu_runner.cli.failures import ending_of
from cu_runner.config.compose import compose
from cu_runner.runtime.signals import Stopped
from cu_runner.schema.errors import ConfigError, MirrorError, TrainingError
from cu_runner.store.records import Row
from cu_runner.store.run_record import read_run
from cu_runner.trackers.base import Ending, TrackedRun, Tracker, short_name, worst_values
from cu_runner.trackers.csv import Csv
from cu_runner.trackers.mirror import Mirror, send
from cu_runner.trackers.wandb import Wandb

TRACKERS = ("csv", "none", "tensorboard", "wandb")
INSTALLED = importlib.util.find_spec("tensorboard") is not None


def row(request: int, ua: float | None, ra: float, drift: float) -> Row:
    metrics = {
        "UA": ua,
        "RA_I": ra,
        "fid": 2 * drift,
        "recovered_x": ra,
        "recovered_x_untouched": ra,
    }
    return Row(request, "moss" if request else "", metrics, drift_l2=drift)


ROWS = [row(0, None, 10.0, 0.0), row(1, 90.0, 80.0, 1.0), row(2, 95.0, 60.0, 0.5)]


@pytest.fixture
def run(tmp_path) -> TrackedRun:
    config = {"train": {"steps": 2}, "model": {"path": "package:shapecanvas/weights/pipeline"}}
    machine = {"host": "abacus", "device": "cpu (abacus)"}
    names = ("smoke", "conabl", ("l2", "gradproj"), "cu-run sequence=smoke", machine)
    return TrackedRun(tmp_path / "runs/smoke/a+b", tmp_path, config, *names)


def tell(tracker: Tracker, run: TrackedRun, requests: list[int], ending: Ending, steps=(1, 2)):
    """Let a tracker follow some requests of the run: two steps each, their losses 10 n + step."""
    grid = io.BytesIO()
    Image.new("RGB", (6, 4), "red").save(grid, "PNG")
    tracker.begin(run)
    for request in requests:
        for step in steps if request else ():
            tracker.log_step(request, {"step": float(step), "loss": 10.0 * request + step})
        tracker.log_request(ROWS[request], grid.getvalue(), None)
    tracker.finish(ending)


# --------------------------------------------------------------------------------- what they write
def test_the_worst_of_every_metric_after_a_request():
    assert worst_values(ROWS) == {
        "UA": 90.0,
        "RA_I": 60.0,
        "fid": 2.0,
        "recovered_x": 80.0,
        "drift_l2": 1.0,
        "drift_l1": 0.0,
        "drift_fraction": 0.0,
    }
    assert worst_values(ROWS[:1]) == {}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("package:shapecanvas/weights/pipeline", "shapecanvas"),
        ("package:shapecanvas/weights/flow", "shapecanvas_flow"),
        ("CompVis/stable-diffusion-v1-4", "stable-diffusion-v1-4"),
        ("/data/sd15.safetensors", "sd15"),
        ("/data/sd15/", "sd15"),
    ],
)
def test_a_model_has_a_short_name(path, name):
    assert short_name(path) == name


def test_wandb_holds_the_last_and_the_worst_and_how_the_run_ended(run, tmp_path):
    tell(Wandb("offline", "p", None), run, [0, 1], Ending("interrupted", 143, "stopped by SIGTERM"))
    rest = replace(run, rows=tuple(ROWS[:2]))
    tell(Wandb("offline", "p", None), rest, [2], Ending("finished"))
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    begun, ended = read_facts_of_wandb(first), read_facts_of_wandb(second)
    assert begun["tags"] == ended["tags"] == ["conabl", "l2", "gradproj", "smoke", "shapecanvas"]
    assert (begun["status"], ended["status"]) == (143, 0)
    assert (begun["summary"]["state"], ended["summary"]["state"]) == ("interrupted", "finished")
    assert begun["summary"]["reason"] == "stopped by SIGTERM"
    assert begun["summary"]["worst/RA_I"] == begun["summary"]["RA_I"] == 80.0
    last = {name: ended["summary"][name] for name in ("UA", "RA_I", "drift_l2", "request")}
    assert last == {"UA": 95.0, "RA_I": 60.0, "drift_l2": 0.5, "request": 2}
    worst = {name: ended["summary"][f"worst/{name}"] for name in ("UA", "RA_I", "drift_l2")}
    assert worst == {"UA": 90.0, "RA_I": 60.0, "drift_l2": 1.0}  # of both processes
    for name in ("UA", "RA_I", "drift_l2", "grid", "accuracy"):
        assert ended["axes"][name] == "request"
    assert ended["axes"]["training/*"] == "training/step"

    server = WandbServer(rows=4)  # which has what the first process logged
    env = environment(**server.environment, WANDB_RESUME="allow")
    done = run_script("wandb", "sync", second, cwd=tmp_path, env=env)
    server.shut()
    assert done.returncode == 0, done.stderr
    assert server.opened()["name"] == "a_b"
    assert server.offsets()[0] == 4  # behind them: it is one run
    assert [row["training/loss"] for row in server.history()[:2]] == [21.0, 22.0]


def test_csv_files_grow_with_the_run_and_a_resume_replaces_what_it_makes_again(run, tmp_path):
    folder = tmp_path / "csv/smoke/a+b"
    tracker = Csv()
    tracker.begin(run)
    tracker.log_step(1, {"step": 1.0, "loss": 0.5})
    assert (folder / "training.csv").read_text() == "request,step,loss\n1,1,0.5\n"  # at once
    tracker.log_step(1, {"step": 2.0, "loss": 0.25, "retain": 4.0})  # a part that is new
    tracker.log_step(2, {"step": 1.0, "loss": 7.0})
    table = pd.read_csv(folder / "training.csv")
    assert list(table.columns) == ["request", "step", "loss", "retain"]
    assert table["loss"].tolist() == [0.5, 0.25, 7.0]
    assert table["retain"].fillna(-1).tolist() == [-1, 4.0, -1]
    with (folder / "training.csv").open("a") as file:
        file.write("2,2,3.")  # killed in the middle of a line
    again = Csv()
    tell(again, run, [1, 2], Ending("finished"))
    table = pd.read_csv(folder / "training.csv")
    assert table[["request", "step", "loss"]].to_numpy().tolist() == [
        [1, 1, 11],
        [1, 2, 12],
        [2, 1, 21],
        [2, 2, 22],
    ]
    tell(Csv(), run, [2], Ending("finished"), steps=(2,))  # from a checkpoint after step 1
    again = pd.read_csv(folder / "training.csv")
    pd.testing.assert_frame_equal(again, table)
    requests = pd.read_csv(folder / "requests.csv")
    assert requests["request"].tolist() == [1, 2]
    assert requests["RA_I"].tolist() == [80.0, 60.0]
    with (folder / "requests.csv").open() as file:
        assert next(csv.reader(file)) == list(ROWS[1].flat())


@pytest.mark.skipif(not INSTALLED, reason="the package tensorboard is not installed")
def test_tensorboard_files_hold_losses_metrics_and_grids(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from cu_runner.trackers.tensorboard import Tensorboard

    tell(Tensorboard(), run, [0, 1, 2], Ending("interrupted", 130, "interrupted"))
    tell(Tensorboard(), run, [2], Ending("finished"), steps=(2,))
    folder = tmp_path / "tensorboard/smoke/a+b"
    requests = EventAccumulator(str(folder / "requests")).Reload()
    seen = [(event.step, event.value) for event in requests.Scalars("RA_I")]
    assert seen == [(0, 10.0), (1, 80.0), (2, 60.0)]
    assert [event.step for event in requests.Scalars("UA")] == [1, 2]
    assert [(image.width, image.height) for image in requests.Images("grid")] == [(6, 4)] * 3
    said = requests.Tensors("configuration/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "command: cu-run sequence=smoke" in said
    assert "host: abacus" in said
    assert "steps: 2" in said
    training = EventAccumulator(str(folder / "training")).Reload()
    losses = [(event.step, event.value) for event in training.Scalars("loss")]
    assert losses == [(1, 11.0), (2, 12.0), (3, 21.0), (4, 22.0)]


def test_tensorboard_without_its_package_is_refused_in_a_line(monkeypatch):
    from cu_runner.trackers import tensorboard

    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'cu_runner\[tensorboard\]'"):
        tensorboard.Tensorboard()


def test_a_finished_run_can_be_told_to_any_tracker(tmp_path):
    made = make_run(tmp_path, finished=2)
    config = yaml.safe_load((made / "config.yaml").read_text())
    record = read_run(made)
    record = replace(record, config=config | {"train": {"steps": 60}, "model": {"path": "x/y"}})
    ended = []

    class Own(Csv):
        def finish(self, ending):
            ended.append(ending)

    send(record, Own(), tmp_path)
    table = pd.read_csv(tmp_path / "csv/hand" / made.name / "requests.csv")
    pd.testing.assert_series_equal(table["RA_I"], record.table["RA_I"])
    assert ended == [Ending("interrupted", 1, "2 of 3 requests are finished")]


# ----------------------------------------------------------------------------------- one that fails
class Broken(Tracker):
    title = "Broken"

    def log_step(self, request, row):
        raise OSError(28, "No space left\non device")


def test_one_that_fails_is_left_out_and_the_others_go_on(run, caplog):
    class Counting(Tracker):
        steps = 0

        def log_step(self, request, row):
            self.steps += 1

    counting = Counting()
    mirror = Mirror({"broken": Broken(), "counting": counting}, run)
    mirror.begin([])
    mirror.log_step(1, {"step": 1.0, "loss": 1.0})
    mirror.log_step(1, {"step": 2.0, "loss": 1.0})
    assert counting.steps == 2
    (line,) = caplog.messages
    assert line.startswith("Broken is not written from here on: ")
    assert "[Errno 28] No space left on device (the run directory is complete)" in line
    strict = Mirror({"broken": Broken()}, run, must=True)
    strict.begin([])
    with pytest.raises(MirrorError, match="No space left on device"):
        strict.log_step(1, {"step": 1.0, "loss": 1.0})


def test_how_a_run_ended():
    assert ending_of(Stopped(15, {})) == Ending("interrupted", 143, "stopped by SIGTERM")
    assert ending_of(KeyboardInterrupt()) == Ending("interrupted", 130, "interrupted")
    lost = TrainingError("training led to a loss of nan")
    assert ending_of(lost) == Ending("failed", 1, "training led to a loss of nan")
    assert ending_of(ConfigError("no")) == Ending("failed", 2, "no")
    assert ending_of(ZeroDivisionError("x")) == Ending("crashed", 1, "ZeroDivisionError: x")


# ------------------------------------------------------------------------------- the group of conf/
def test_trackers_are_chosen_as_regularizers_are_and_are_no_part_of_the_run(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    plans = {name: compose(["sequence=smoke", f"tracker={name}"]) for name in TRACKERS}
    both = compose(["sequence=smoke", "tracker=[csv,wandb]", "wandb.project=mine"])
    today = compose(["sequence=smoke"])
    assert list(today.trackers) == ["wandb"]
    assert today.trackers["wandb"].arguments == {
        "mode": "offline",
        "project": "cu_runner",
        "entity": None,
    }
    assert list(plans["none"].trackers) == []
    assert list(both.trackers) == ["csv", "wandb"]
    assert both.trackers["wandb"].arguments["project"] == "mine"
    for plan in (*plans.values(), both):
        assert plan.signature == today.signature
        assert plan.resolved.keys() == today.resolved.keys()
    assert "tracker" not in today.resolved
    assert today.resolved["wandb"]["mode"] == "offline"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["tracker=wandbb"],
            r"tracker=wandbb: no such file in conf/tracker; allowed: csv, none",
        ),
        (["tracker=csv", "+tracker.csv.folder=x"], r"unknown key tracker.csv.folder; allowed: "),
        (
            ["tracker=csv", "+tracker.wandb.mode=online"],
            r"the tracker is not selected \(selected",
        ),
    ],
)
def test_a_tracker_that_is_none_is_refused_in_a_line(in_process, words, said):
    status, out, err = in_process("sequence=smoke", *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert pd.Series([err]).str.contains(said).all(), err


OWN = '''
"""A tracker that writes down what it is told, and presses ctrl-C once."""
from pathlib import Path
from cu_runner.trackers.base import Tracker

class Diary(Tracker):
    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def note(self, *words):
        with self.file.open("a") as file:
            print(*words, file=file)

    def begin(self, run):
        assert run.machine["host"] and run.machine["device"].startswith("cpu")
        self.note("begin", len(run.rows), run.command)

    def log_step(self, request, row):
        self.note("step", request, int(row["step"]))
        if (request, row["step"]) == (2, 2) and self.file.read_text().count("begin") == 1:
            raise KeyboardInterrupt

    def log_request(self, row, grid, training):
        self.note("request", row.request, training is not None)

    def finish(self, ending):
        self.note(ending.state, ending.status)
'''


def test_one_of_your_own_follows_a_run_that_is_interrupted(
    in_process, tmp_path, monkeypatch, filled_cache
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "diary_module.py").write_text(OWN)
    (tmp_path / "tree/tracker").mkdir(parents=True)
    file = tmp_path / "tree/tracker/diary.yaml"
    file.write_text("# Mine.\ndiary: {_target_: diary_module.Diary, file: diary.txt}\n")
    words = [word for word in SMOKE if not word.startswith("wandb.")]
    words = ["--config-dir", str(tmp_path / "tree"), *words, "allow_modules=[diary_module]"]
    status, out, err = in_process(*words, "tracker=[diary,csv]")
    assert (status, err.count("\n")) == (130, 1), err
    status, again, err = in_process(*words, "tracker=[diary,csv]")
    assert (status, err) == (0, "")
    lines = again.splitlines()
    assert (
        lines[0] == lines[-1] == out.splitlines()[0]
    )  # the first thing that it says, and the last
    run = run_directory(again, tmp_path)
    sys.modules.pop("diary_module", None)
    told = (tmp_path / "diary.txt").read_text().splitlines()
    command = "cu-run --config-dir="
    assert told[0].startswith(f"begin 0 {command}")
    assert "sequence=smoke" in told[0]
    assert "tracker=" not in told[0]  # no part of what makes the run again
    steps = [[f"step {request} {step}" for step in (1, 2, 3)] for request in (1, 2)]
    middle = ["request 0 False", *steps[0], "request 1 True", *steps[1][:2], "interrupted 130"]
    assert told[1 : len(middle) + 1] == middle
    rest = told[len(middle) + 1 :]
    assert rest[0].startswith(f"begin 2 {command}")
    assert rest[1:] == ["request 1 True", *steps[1], "request 2 True", "finished 0"]
    assert "tracker" not in (run / "config.yaml").read_text()
    losses = pd.read_csv(tmp_path / "outputs/csv/smoke" / run.name / "training.csv")
    saved = pd.concat([pd.read_csv(run / f"steps/0{index}/training.csv") for index in (1, 2)])
    assert losses["request"].tolist() == [1, 1, 1, 2, 2, 2]
    assert losses["loss"].tolist() == saved["loss"].tolist()
    metrics = pd.read_csv(run / "metrics.csv")
    written = pd.read_csv(tmp_path / "outputs/csv/smoke" / run.name / "requests.csv")
    pd.testing.assert_frame_equal(written, metrics)
    assert not Path("outputs/wandb").exists()
