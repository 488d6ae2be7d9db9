"""An offline W&B run, read back from the file that W&B wrote: configuration, metrics, the grid, the
id of a resumed run.
"""

import functools
import itertools
import json
import platform
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pandas as pd
import pytest
from commands import environment, patch, run_forked
from conftest import SMOKE, run_directory
from PIL import Image
from wandb_records import read_facts_of_wandb, read_run_of_wandb
from wandb_server import WandbServer

from cu_runner import __version__
from cu_runner.config.compose import compose
from cu_runner.store.run_record import read_run
from cu_runner.trackers.mirror import send
from cu_runner.trackers.wandb import Wandb

APART = 3 + 1  # numbers of W&B between requests: those of the training steps lie before


def by_request(history: dict[int, dict]) -> dict[int, dict]:
    """The rows of the requests themselves."""
    return {place // APART: row for place, row in history.items() if "training/step" not in row}


OFFLINE = [override for override in SMOKE if not override.startswith("wandb.")]


@pytest.fixture
def offline(in_process, tmp_path):
    """A run without wandb.mode, so offline; its directory and the W&B directories that it wrote."""
    status, out, err = in_process(*OFFLINE)
    assert (status, err) == (0, "")
    assert out.strip().splitlines()[-1].startswith("run: ")
    return run_directory(out, tmp_path), list((tmp_path / "outputs/wandb").glob("offline-run-*"))


def test_an_offline_run_holds_configuration_metrics_and_grids_and_a_resume_has_its_id(
    offline, in_process, tmp_path
):
    directory, (written,) = offline
    found = read_run_of_wandb(written)
    assert (found["id"], found["name"], found["project"]) == (
        directory.name,
        directory.name,
        "cu_runner",
    )
    assert (found["group"], found["job_type"]) == ("smoke-conabl", "none")
    assert found["config"]["code"]["version"] == __version__
    assert found["config"]["train"]["steps"] == 3
    assert found["config"]["command"].startswith("cu-run sequence=smoke train.steps=3")
    assert found["config"]["machine"]["host"] == platform.node()
    assert found["config"]["machine"]["device"].startswith("cpu (")
    assert found["config"]["sequence"]["targets"] == ["torch light", "snow drift"]
    assert found["config"]["seed"] == 0

    table = pd.read_csv(directory / "metrics.csv")
    rows = by_request(found["history"])
    assert sorted(rows) == [0, 1, 2]
    for index in (1, 2):  # live: before the request's own row
        training = pd.read_csv(directory / f"steps/0{index}/training.csv")
        for step, logged in training.iterrows():
            live = found["history"][APART * (index - 1) + step + 1]
            assert live["training/loss"] == pytest.approx(logged["loss"], rel=1e-9)
            assert live["training/step"] == 3 * (index - 1) + step + 1
    assert len(found["history"]) == 3 + 2 * 3
    for index, row in rows.items():
        for name in table.columns.drop("concept"):
            value = table[name][index]
            assert (
                name not in row if pd.isna(value) else row[name] == pytest.approx(value, rel=1e-9)
            ), name
        assert row["concept"] == ("" if index == 0 else table["concept"][index])
        assert row["grid._type"] == "image-file"
        saved = Image.open(written / "files" / row["grid.path"])
        original = Image.open(directory / f"steps/0{index}/grid.png")
        assert saved.size == original.size == (row["grid.width"], row["grid.height"])
        assert saved.convert("RGB").tobytes() == original.convert("RGB").tobytes()

    facts = read_facts_of_wandb(written)
    assert facts["tags"] == ["conabl", "none", "smoke", "shapecanvas"]
    assert (facts["status"], facts["summary"]["state"]) == (0, "finished")
    assert facts["summary"]["worst/RA_I"] == table["RA_I"][1:].min()
    assert facts["summary"]["RA_I"] == table["RA_I"][2]
    table = json.loads((written / "files" / rows[2]["accuracy.path"]).read_text())
    matrix = read_run(directory).accuracy_matrix()
    assert table["columns"] == ["concept", "0", "1", "2"]
    assert [row[0] for row in table["data"]] == list(matrix.index)
    assert [row[3] for row in table["data"]] == list(matrix[2])
    assert table["data"][1][2] is None  # the second target was not measured at request 1

    shutil.rmtree(directory / "steps/02")
    (directory / "summary.json").unlink()
    status, _, err = in_process(*OFFLINE)
    assert (status, err) == (0, "")
    (resumed,) = set((tmp_path / "outputs/wandb").glob("offline-run-*")) - {written}
    again = read_run_of_wandb(resumed)
    assert again["id"] == found["id"]
    remade = by_request(again["history"])
    # step 1 may be mirrored again: a kill may have come between commit and mirror
    assert set(remade) - {1} == {2}
    for index, row in remade.items():
        for name in ("request", "concept", "UA", "RA_C", "drift_l2", "grid.sha256"):
            assert row[name] == rows[index][name], name
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}


def test_the_environment_switches_it_off(in_process, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    status, _, err = in_process(*OFFLINE)
    assert (status, err) == (0, "")
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"runs", "cache"}


def test_a_finished_run_can_be_sent_later(run_copy, tmp_path):
    run = read_run(run_copy)
    send(run, Wandb("offline", "elsewhere", None), tmp_path)
    (written,) = (tmp_path / "wandb").glob("offline-run-*")
    found = read_run_of_wandb(written)
    assert (found["name"], found["group"], found["project"]) == (
        run_copy.name,
        "smoke-conabl",
        "elsewhere",
    )
    rows = by_request(found["history"])
    assert sorted(rows) == [0, 1, 2]
    for index, row in rows.items():
        assert row["RA_C"] == pytest.approx(run.table["RA_C"][index])
        assert row["grid._type"] == "image-file"
    assert "accuracy.path" in rows[2]
    assert "training.path" in rows[1]
    losses = [row["training/loss"] for row in found["history"].values() if "training/loss" in row]
    csv = [pd.read_csv(run_copy / f"steps/0{index}/training.csv")["loss"] for index in (1, 2)]
    assert losses == pytest.approx([*csv[0], *csv[1]])


def test_the_shipped_sweep_composes_for_every_combination_as_an_agent_would_call_it():
    """Through W&B's own reader of a sweep's file and its own filling of the command."""
    from wandb.sdk.launch.sweeps.utils import (
        create_sweep_command,
        create_sweep_command_args,
        load_sweep_config,
    )

    sweep = load_sweep_config(str(Path(__file__).parents[2] / "scripts/wandb_sweep.yaml"))
    names, choices = zip(
        *((name, entry["values"]) for name, entry in sweep["parameters"].items()), strict=True
    )
    signatures = set()
    for values in itertools.product(*choices):
        arguments = create_sweep_command_args(
            {"args": {name: {"value": value} for name, value in zip(names, values, strict=True)}}
        )
        command = []
        for part in create_sweep_command(list(sweep["command"])):
            found = re.fullmatch(r"\$\{(\w+)\}", part)
            command += (
                [part]
                if found is None
                else ["/usr/bin/env"]
                if found[1] == "env"
                else arguments[found[1]]
            )
        assert command[:3] == ["/usr/bin/env", "cu-run", "wandb.mode=online"]
        plan = compose(command[2:])
        assert plan.spine.wandb.mode == "online"
        assert (
            plan.method_name,
            "+".join(plan.regularizers) or "none",
            plan.spine.train.lr,
        ) == values
        signatures.add(plan.signature)
    assert len(signatures) == 8
    assert sweep["metric"]["name"] in ("UA", "RA_I", "RA_C")


# ------------------------------------------------------------------------- online, and no longer so
# A command that waits for uploads for 5 s. WANDB_FINISH_TIMEOUT would not do: W&B reads it itself,
# whatever cu-run asks for.
hasty = functools.partial(patch, "cu_runner.trackers.wandb", "FINISH_SECONDS", 5.0)


def online(cwd, server, before=None, **variables: str) -> tuple[subprocess.CompletedProcess, Path]:
    """A run that logs to the server, as a process; and its directory."""
    done = run_forked(
        "cu-run",
        *OFFLINE,
        cwd=cwd,
        env=environment(**server.environment, **variables),
        before=before,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done, run_directory(done.stdout, cwd)


def test_an_online_run_sends_its_configuration_and_every_request(tmp_path):
    server = WandbServer()
    done, directory = online(tmp_path, server)
    server.shut()
    assert "W&B is not written" not in done.stdout
    begun = server.opened()
    assert (begun["project"], begun["name"], begun["groupName"]) == (
        "cu_runner",
        directory.name,
        "smoke-conabl",
    )
    assert json.loads(begun["config"])["seed"]["value"] == 0
    assert begun["tags"] == ["conabl", "none", "smoke", "shapecanvas"]
    assert server.exit_codes() == [0]
    table, rows = (
        pd.read_csv(directory / "metrics.csv"),
        by_request({row["_step"]: row for row in server.history()}),
    )
    assert sorted(rows) == [0, 1, 2]
    for step, row in rows.items():
        assert row["RA_I"] == table["RA_I"][step]
        assert row["grid"]["_type"] == "image-file"


def test_a_server_that_is_lost_in_the_middle_does_not_hold_the_run_up(tmp_path):
    def lose(server: WandbServer, path: str) -> None:
        if path.endswith("/file_stream"):  # the first thing that is logged
            threading.Thread(target=server.shut).start()

    server = WandbServer(after=lose)
    done, directory = online(tmp_path, server, hasty)  # within a time limit
    (line,) = [
        line for line in done.stdout.splitlines() if "W&B is not written from here on" in line
    ]
    assert "cu-report RUN --wandb online" in line
    assert len(read_run(directory).records) == 3


def test_without_a_server_the_run_goes_on_and_says_so(tmp_path):
    server = WandbServer()
    server.shut()
    done, directory = online(tmp_path, server, WANDB_INIT_TIMEOUT="3")
    assert [
        line
        for line in done.stdout.splitlines()
        if line.startswith("W&B is not written from here on")
    ]
    assert len(read_run(directory).records) == 3
    assert server.requests == []


@pytest.mark.slow
def test_a_run_that_does_not_arrive_is_not_called_sent(run_copy, tmp_path):
    """W&B's client takes every log; only its end says that the server is gone."""
    server = WandbServer(
        after=lambda server, path: (
            threading.Thread(target=server.shut).start() if "file_stream" in path else None
        )
    )
    env = environment(**server.environment)
    done = run_forked(
        "cu-report", run_copy, "--wandb", "online", cwd=tmp_path, env=env, before=hasty
    )
    assert done.returncode == 1
    assert done.stdout == f"report: outputs/reports/{run_copy.name}/index.html\n"
    assert done.stderr.splitlines()[-1].startswith(
        f"cu-report: {run_copy.name}: not sent to W&B (online): "
    )
