"""The state of a request in the middle of its training: what is saved, when, and what a run does
with it.
"""

import io
import json
import logging
import os
import signal

import pytest
import safetensors.torch
import torch
from conftest import SMOKE, run_directory

from cu_runner.methods._primal_dual import DualAscent
from cu_runner.methods.conabl import ConAbl
from cu_runner.methods.forward_kl import ForwardKL
from cu_runner.methods.likelihood import Likelihood
from cu_runner.methods.reverse_kl import ReverseKL
from cu_runner.methods.sculpmem import SculpMem
from cu_runner.models.parameters import assign, snapshot
from cu_runner.regularizers.replay import Replay
from cu_runner.request.images import RetainSet
from cu_runner.runner.runner import Runner
from cu_runner.runner.training import Training, erase
from cu_runner.runtime.signals import Stopped, StopSignals
from cu_runner.store.checkpoint import FILE, WORTH, Checkpoint

KEY = {"request": 2, "parent": "abc"}
STATE = {
    "training": {"rows": [{"step": 1, "loss": float("nan")}], "params": {"w": torch.arange(3.0)}},
    "early_stop": [],
}


@pytest.fixture
def checkpoint(tmp_path):
    """Returns make(every) -> Checkpoint that has begun the request of KEY."""

    def make(every=None) -> Checkpoint:
        made = Checkpoint(tmp_path, every, torch.device("cpu"))
        made.begin(KEY)
        return made

    return make


# ----------------------------------------------------------------------------------------- the file
def test_what_is_saved_comes_back(checkpoint):
    checkpoint().save(STATE)
    found = checkpoint().begin(KEY)
    assert found["training"]["params"]["w"].tolist() == [0, 1, 2]
    assert found["training"]["rows"][0]["step"] == 1


def test_nothing_is_found_before_the_first_save_and_after_the_commit(checkpoint):
    kept = checkpoint()
    assert kept.begin(KEY) is None
    kept.save(STATE)
    kept.remove()
    kept.remove()
    assert kept.begin(KEY) is None


def test_the_state_of_another_request_is_not_taken(checkpoint):
    checkpoint().save(STATE)
    assert checkpoint().begin(KEY | {"parent": "abd"}) is None


def test_a_damaged_file_is_named_and_not_taken(checkpoint, tmp_path, caplog):
    kept = checkpoint()
    kept.save(STATE)
    whole = (tmp_path / FILE).read_bytes()
    damages = [b"", b"no header", whole[: len(whole) // 2], whole[:-1]]
    header = range(whole.index(b"\n") + 1)
    damages += [
        whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :]
        for i in (*header, len(header) + 50, len(whole) - 1)
    ]
    logging.getLogger("cu_runner").propagate = True
    for content in damages:
        (tmp_path / FILE).write_bytes(content)
        caplog.clear()
        assert kept.begin(KEY) is None
        assert caplog.messages == [f"{tmp_path / FILE}: is damaged; the request begins anew"]


def test_no_code_can_hide_in_it(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    checkpoint().save({"training": Evil()})
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoint().begin(KEY)
    assert not (tmp_path / "evil").exists()


# ------------------------------------------------------------------------------------ when it saves
def test_every_so_many_steps_or_minutes(checkpoint, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("cu_runner.store.checkpoint.time.monotonic", lambda: clock[0])
    by_steps, by_minutes, never = checkpoint(5), checkpoint("0.5min"), checkpoint(None)
    assert [step for step in range(1, 12) if by_steps.is_due(step, False)] == [5, 10]
    assert not by_minutes.is_due(1, False)
    clock[0] += 30
    assert by_minutes.is_due(1, False)
    by_minutes.save(STATE)
    assert not by_minutes.is_due(2, False)
    clock[0] += 10_000
    assert not never.is_due(1, True)


def test_the_end_of_a_long_training_is_saved_that_of_a_short_one_is_not(checkpoint, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("cu_runner.store.checkpoint.time.monotonic", lambda: clock[0])
    kept = checkpoint(1000)
    assert not kept.is_due(60, True)
    clock[0] += WORTH
    assert kept.is_due(60, True)


@pytest.mark.parametrize("value", ["0", "-5", "5h", "min", "true"])
def test_other_values_are_refused(in_process, value):
    status, _, err = in_process(*SMOKE, f"train.save_every={value}", "dry_run=true")
    assert status == 2
    assert err.startswith("cu-run: train.save_every")
    assert err.count("\n") == 1


# ----------------------------------------------------------------------------------------- the loop
RETAIN, DUAL = RetainSet("anchors", images=4), DualAscent(step_size=0.5, every=2, rounds=1)
# with what changes from step to step: masks and gathered gradients, multipliers and running means,
# a count
MAKE = {
    "conabl, replay": lambda: (ConAbl(num_anchors=4), {"replay": Replay(0.5, retain=RETAIN)}),
    "sculpmem": lambda: (SculpMem(num_anchors=4, warmup=2, interval=2, until=1.0), {}),
    "reverse_kl": lambda: (ReverseKL(sampling_steps=2, retain=RETAIN, dual=DUAL), {}),
    "forward_kl": lambda: (ForwardKL(num_images=4, num_fresh=2, retain=RETAIN, dual=DUAL), {}),
    "likelihood": lambda: (
        Likelihood(sampling_steps=2, draws=2, bound=0.1, retain=RETAIN, dual=DUAL),
        {},
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("reverse_kl", "forward_kl") else name
        for name in MAKE
    ],
)
def test_training_goes_on_bitwise_from_every_step(make_scope, settings, name):
    steps = 6 if name == "sculpmem" else 4  # one change of its mask, or two of the multipliers
    scope = make_scope(steps=steps, batch_size=2)

    def begin() -> Training:
        assign(scope.params, scope.base)
        return Training(scope, *MAKE[name](), settings(steps=steps))

    whole, states = begin(), []
    while whole.done < steps:
        whole.step()
        buffer = io.BytesIO()
        torch.save(whole.state(), buffer)
        states.append(buffer.getvalue())
    expected, report = snapshot(scope.params), whole.finish()
    for state in states:
        training = begin()
        training.restore(torch.load(io.BytesIO(state), weights_only=True))
        while training.done < steps:
            training.step()
        assert all(parameter.equal(expected[key]) for key, parameter in scope.params.items())
        again = training.finish()
        assert (repr(again.logs), repr(again.method)) == (
            repr(report.logs),
            repr(report.method),
        )  # a NaN is no NaN's equal


# -------------------------------------------------------------------------------------- the signals
def test_a_signal_waits_for_what_must_be_whole():
    done = []

    def work(stop: StopSignals) -> None:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
            done.append("whole")
        done.append("never")

    with StopSignals() as stop, pytest.raises(Stopped, match="stopped by SIGTERM") as caught:
        work(stop)
    assert done == ["whole"]
    assert caught.value.status == 128 + signal.SIGTERM


def test_a_signal_stops_at_once_elsewhere_and_the_handlers_come_back():
    before = [
        signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    ]
    with pytest.raises(Stopped), StopSignals():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert [
        signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    ] == before


@pytest.fixture
def ctrl_c():
    """ctrl-C as at a terminal, also where a shell made its background job ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_ctrl_c_stops_at_once(ctrl_c, caplog):
    """What the first does is said at once: before the work that it waits for is done."""
    caplog.set_level(logging.INFO, "cu_runner")
    reached = []

    def work(stop: StopSignals) -> None:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            (line,) = caplog.messages
            assert line.startswith("SIGINT: what was done is being saved")
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("after the first")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the second")

    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        work(stop)
    assert reached == ["after the first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("sent", "requeued"),
    [(signal.SIGUSR1, [signal.SIGUSR2]), (signal.SIGUSR2, [signal.SIGUSR2]), (signal.SIGTERM, [])],
)
def test_the_launcher_requeues_for_a_warning_and_not_for_a_kill(sent, requeued):
    calls = []
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: calls.append(signum))
    try:
        with pytest.raises(Stopped) as caught, StopSignals():
            os.kill(os.getpid(), sent)
        caught.value.requeue()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert calls == requeued


# ------------------------------------------------------------------------------------------ the run
def kill_after(monkeypatch, step: int, how) -> None:
    """The step-th call after a training step ends the process as `how` does."""
    seen = iter(range(1, step))
    monkeypatch.setattr(
        Runner, "_note_first_step", lambda runner: next(seen, None) is None and how()
    )


class Killed(BaseException):
    """As good as kill -9: nothing of ours handles it."""


def die():
    raise Killed


def test_a_killed_run_goes_on_from_the_last_save_bitwise(
    in_process, filled_cache, tmp_path, monkeypatch
):
    calm = [*SMOKE, "train.steps=5", "paths.outputs=calm"]
    status, out, _ = in_process(*calm)
    assert status == 0
    expected = run_directory(out, tmp_path)
    chosen = [*SMOKE, "train.steps=5", "train.save_every=3"]
    with monkeypatch.context() as patch:
        kill_after(patch, 9, die)  # request 2, step 4: saved after step 3
        with pytest.raises(Killed):
            in_process(*chosen)
    status, out, err = in_process(*chosen)
    assert (status, err) == (0, "")
    directory = run_directory(out, tmp_path)
    assert "request 2 goes on after step 3" in out
    assert directory.name == expected.name  # how often is no part of the experiment
    for name in ("steps/02/delta.safetensors", "steps/02/training.csv", "steps/02/predictions.csv"):
        assert (directory / name).read_bytes() == (expected / name).read_bytes()
    assert not (directory / FILE).exists()


def test_early_stop_goes_on_with_what_it_has_measured(
    in_process, filled_cache, tmp_path, monkeypatch
):
    chosen = [
        *SMOKE,
        "train.steps=6",
        "setting=simultaneous",
        "setting.stop_at=1",
        "setting.interval=2",
        "setting.patience=2",
    ]
    with monkeypatch.context() as patch:
        kill_after(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        status, _, _ = in_process(*chosen, "train.save_every=null")
    assert status == 128 + signal.SIGTERM
    status, out, _ = in_process(*chosen)
    assert status == 0
    assert "request 1 goes on after step 3" in out
    directory = run_directory(out, tmp_path)
    seen = json.loads((directory / "steps/01/step.json").read_text())["training"]["early_stop"]
    status, out, _ = in_process(*chosen, "paths.outputs=calm")
    calm = json.loads((run_directory(out, tmp_path) / "steps/01/step.json").read_text())[
        "training"
    ]["early_stop"]
    assert [entry["step"] for entry in seen] == [2, 4, 6][: len(seen)]
    assert seen == calm
    weights = [
        safetensors.torch.load_file(path / "steps/02/delta.safetensors")
        for path in (directory, run_directory(out, tmp_path))
    ]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_ctrl_c_saves_the_request_and_is_one_line_everywhere(
    in_process, ctrl_c, filled_cache, tmp_path, monkeypatch
):
    chosen = [*SMOKE, "train.steps=5", "train.save_every=null"]
    with monkeypatch.context() as patch:
        kill_after(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        status, out, err = in_process(*chosen)
    assert (status, err.count("\n")) == (130, 1)
    assert err.startswith("cu-run: interrupted; what was done is kept.")
    (log,) = (tmp_path / "outputs/runs/smoke").glob("*/run.log")
    assert "Traceback" not in log.read_text()
    assert log.read_text().count("stopped: interrupted\n") == 1
    said = "SIGINT: what was done is being saved, then the run stops; ctrl-C stops it without that"
    assert out.count(said) == 1
    status, out, err = in_process(*chosen)
    assert (status, err) == (0, "")
    assert "request 1 goes on after step 4" in out


class Slow(ConAbl):
    """Is asked to stop while it prepares a request, as one that draws its images is."""

    def begin_request(self, scope):
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("went on")


def test_a_signal_while_a_request_is_prepared_takes_effect_at_once(make_scope, settings):
    with StopSignals() as stop, pytest.raises(Stopped):
        erase(make_scope(), Slow(), {}, settings(steps=1), undisturbed=stop.deferred)
