"""Every method and every regularizer through cu-run: two requests; the second again with an
interruption, bitwise.

Each cell is interrupted at the level of erase(), with what its run gave to it; three of them as
whole runs too.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import torch
from small_runs import names, overrides, run

from cu_runner.concepts.requests import plan_requests
from cu_runner.config.compose import compose
from cu_runner.methods.base import Method
from cu_runner.models.parameters import assign, snapshot, subtract
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.anchors import AnchorImages
from cu_runner.request.scope import Scope
from cu_runner.runner.parts import prepare
from cu_runner.runner.runner import Runner
from cu_runner.runner.training import Training, erase
from cu_runner.runner.weights import choose
from cu_runner.runtime.seeding import RandomSource
from cu_runner.runtime.signals import Stopped, StopSignals
from cu_runner.store.cache import Cache
from cu_runner.store.checkpoint import FILE, Checkpoint
from cu_runner.store.files import to_csv, to_json


def assert_trained(directory: Path) -> pd.DataFrame:
    """Two requests moved the weights; metrics.csv."""
    table = pd.read_csv(directory / "metrics.csv")
    assert table["request"].tolist() == [0, 1, 2]
    assert (table["drift_l2"][1:] > 0).all()
    return table


# each of another kind: the loop's own, a mask, multipliers, a closed form, steps that are changed
QUICK = {("conabl", "none"), ("conabl", "gradproj"), ("conabl", "minvar"), ("uce", "rece")}
CELLS = [
    pytest.param(*cell, marks=[] if cell in QUICK else [pytest.mark.slow])
    # imported trains nothing: tests/methods/test_imported.py
    for cell in [(method, "none") for method in names("method") if method != "imported"]
    # rece erases what a closed form leaves
    + [("uce" if reg == "rece" else "conabl", reg) for reg in names("reg") if reg != "none"]
]
WHOLE = [("conabl", "none"), ("uce", "none"), ("conabl", "gradproj_merge")]


# -------------------------------------------------------------------------------------- one request
class SecondRequest:
    """The second request of a finished run, to be trained again."""

    def __init__(self, chosen: list[str], directory: Path) -> None:
        self._plan, self._directory = compose(chosen), directory
        spine = self._plan.spine
        self.steps = 1 if self._plan.method.build().closed_form else 2  # until it is interrupted
        self._model = self._plan.model.build(device=torch.device("cpu"))
        prepare(self._model, spine.speed, spine.train)
        regularizers = [node.build() for node in self._plan.regularizers.values()]
        sequence = self._plan.sequence.build()
        self._params = choose(self._model, self._plan.method.build(), regularizers, sequence)
        self._base = snapshot(self._params)
        cache = Cache(Path(spine.paths.outputs) / "cache", self._plan.code)
        fingerprint, batch = self._model.fingerprint(), spine.eval.batch_size
        self._anchors = AnchorImages(
            self._model, fingerprint, self._params, self._base, spine.anchors, cache, batch
        )

    def begin(self) -> tuple[Scope, Method, dict[str, Regularizer]]:
        """What a new process has before the first step."""
        plan, spine, sequence = self._plan, self._plan.spine, self._plan.sequence.build()
        request = plan_requests(sequence, plan.setting.plan)[1]
        assign(self._params, self._base)
        if request.start == "previous":
            delta = safetensors.torch.load_file(self._directory / "steps/01/delta.safetensors")
            assign(self._params, self._base, {name: delta[name] for name in self._params})
        scope = Scope(
            model=self._model,
            sequence=sequence,
            request=request,
            params=self._params,
            start=snapshot(self._params),
            base=self._base,
            rng=RandomSource(spine.seed, request.index),
            train=spine.train,
            anchors=self._anchors.latents,
        )
        return (
            scope,
            plan.method.build(),
            {name: node.build() for name, node in plan.regularizers.items()},
        )

    def interrupt(self, last: int) -> None:
        """Train until a signal comes in this step, and save the state as a run does."""
        checkpoint = self._checkpoint()
        assert checkpoint.begin({"request": 2}) is None

        def after_step(training: Training) -> None:
            if training.done == last:
                os.kill(os.getpid(), signal.SIGUSR1)
            if stop.received:
                checkpoint.save({"training": training.state()})
            stop.check()

        with StopSignals() as stop, pytest.raises(Stopped, match="stopped by SIGUSR1"):
            erase(*self.begin(), self._plan.spine.train, after_step, undisturbed=stop.deferred)

    def resume(self, last: int) -> tuple[dict[str, torch.Tensor], bytes, dict[str, object]]:
        """Train the rest: the delta, training.csv, and the records of the method and the
        regularizers.
        """
        scope, method, regularizers = self.begin()
        state = self._checkpoint().begin({"request": 2})["training"]
        assert len(state["rows"]) == last
        report = erase(scope, method, regularizers, self._plan.spine.train, state=state)
        kept = {
            name: entry
            for name, entry in report.regularizers.items()
            if regularizers[name].acts_on != ("weights",)
        }
        records = json.loads(to_json({"method": report.method, "regularizers": kept}))
        return subtract(self._params, self._base), to_csv(pd.DataFrame(report.logs)), records

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self._directory, None, torch.device("cpu"))


@pytest.mark.parametrize(("method", "reg"), CELLS)
def test_a_request_that_is_interrupted_ends_bitwise_the_same(
    in_process, filled_cache, tmp_path, method, reg
):
    chosen = overrides(method, reg)
    directory, delta = run(in_process, tmp_path, chosen)
    assert_trained(directory)
    request = SecondRequest(chosen, directory)
    request.interrupt(request.steps)
    again, logs, records = request.resume(request.steps)
    assert set(again) == set(delta)
    assert all(again[name].equal(delta[name]) for name in delta)
    assert logs == (directory / "steps/02/training.csv").read_bytes()
    recorded = json.loads((directory / "steps/02/step.json").read_text())["training"]
    assert records == {name: recorded[name] for name in records}


# --------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize(("method", "reg"), WHOLE)
def test_a_run_that_is_interrupted_ends_bitwise_the_same(
    in_process, filled_cache, tmp_path, monkeypatch, method, reg
):
    chosen = overrides(method, reg)
    directory, first = run(in_process, tmp_path, chosen)
    table = assert_trained(directory)
    for name in (
        "steps/02/step.json",
        "summary.json",
        "metrics.csv",
    ):  # as if killed before the commit
        (directory / name).unlink()
    shutil.rmtree(tmp_path / "outputs/cache")
    with monkeypatch.context() as patch:
        steps = iter(
            [] if method == "uce" else [None]
        )  # signalled after step 2; the closed form has only one
        patch.setattr(
            Runner,
            "_note_first_step",
            lambda runner: next(steps, 0) == 0 and os.kill(os.getpid(), signal.SIGUSR1),
        )
        status, _, err = in_process(*chosen)
    assert (status, err) == (
        128 + signal.SIGUSR1,
        "cu-run: stopped by SIGUSR1; what was done is kept. Run the same command again to go on\n",
    )
    assert (directory / FILE).is_file()
    assert not (directory / "steps/02/step.json").exists()
    again, second = run(in_process, tmp_path, chosen)
    assert again == directory
    assert (
        f"request 2 goes on after step {1 if method == 'uce' else 2}"
        in (directory / "run.log").read_text()
    )
    assert not (directory / FILE).exists()
    assert all(first[name].equal(second[name]) for name in first)
    columns = [name for name in table.columns if not name.endswith(("seconds", "memory_mb"))]
    pd.testing.assert_frame_equal(pd.read_csv(directory / "metrics.csv")[columns], table[columns])
