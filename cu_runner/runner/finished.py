"""The model of a finished run as one of its steps left it, and as a plain pipeline of diffusers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import safetensors

from cu_runner.config.targets import make_node
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.gates import load_gates
from cu_runner.models.parameters import assign, is_gate, snapshot
from cu_runner.models.pipeline import make_pipeline
from cu_runner.runtime.progress import slow
from cu_runner.schema.errors import StoreError
from cu_runner.schema.values import ConfigTree
from cu_runner.store.files import DAMAGED, has_intact_header, read_delta, unreadable
from cu_runner.store.layout import CONFIG
from cu_runner.store.proof import require_true
from cu_runner.store.run_record import RunRecord, read_run

if TYPE_CHECKING:
    from pathlib import Path

    import diffusers


def load_step(
    run: RunRecord,
    index: int,
    *,
    device: str = "cpu",
    config: ConfigTree | None = None,
    allowed: tuple[str, ...] = (),
) -> DiffusionModel:
    """Load the model of a run, with the weights that a step was measured with.

    Its method and regularizers are not built: code of the user's is needed for a model of his own
    alone.

    Args:
        index: of the step; 0 is the untouched model.
        config: the run's configuration with another place of its model; None is its own.
        allowed: modules beside cu_runner that its `_target_` may name.

    Raises:
        StoreError: what the step says of itself does not hold, or another model lies in the place.
            ModelError: no model can be loaded from there.
    """
    prove_step(run, index)
    node = make_node("model", (config or run.config)["model"], DiffusionModel, allowed)
    with slow("loading the model"):
        model = node.build(device=device)
    refuse_other_model(run, model)
    if index:
        set_change(model, trained_run(run).weights(index))
    return model


def step_pipeline(
    run: RunRecord, index: int, *, device: str = "cpu"
) -> diffusers.DiffusionPipeline:
    """Return load_step() as a plain pipeline of diffusers.

    Raises:
        ModelError: the run has gates. What load_step() raises.
    """
    return make_pipeline(load_step(run, index, device=device))


def trained_run(run: RunRecord) -> RunRecord:
    """Return the run that has the weights: itself, or that which an evaluation measured."""
    return read_run(run.directory.parent.parent) if run.is_evaluation else run


def prove_step(run: RunRecord, index: int) -> None:
    """Hold a step against its files: its weights, its metrics, and what it says it was made from.

    read_run() has followed the chain of hashes down to it.

    Raises:
        ValueError: there is no such step. StoreError: something differs.
    """
    last = len(run.records) - 1
    if not 0 <= index <= last:
        raise ValueError(f"step {index}: the run has finished steps 0 to {last}")
    trained = trained_run(run)
    for each in dict.fromkeys((trained.directory, run.directory)):
        if not has_intact_header((each / CONFIG).read_bytes()):
            raise StoreError(f"{each / CONFIG}: does not match its sha256; restore it")
    if run.is_evaluation and run.records[index].run_sha256 != trained.records[index].sha256:
        raise StoreError(f"{run.directory}: measured other weights than {trained.directory} has")
    if index:
        trained.require_weights(index)
    until = slice(index + 1)
    for each_run in (trained, run):
        short = dataclasses.replace(each_run, records=each_run.records[until])
        require_true(short, [index])


def refuse_other_model(run: RunRecord, model: DiffusionModel) -> None:
    """Raise StoreError unless an untouched model is the one that the run began with."""
    if model.fingerprint() != run.records[0].model_sha256:
        raise StoreError(
            f"{run.directory}: was made with another model; restore it or give model.path=..."
        )


def set_change(model: DiffusionModel, path: Path) -> None:
    """Add a step's weights theta - theta_base to those of the untouched model, or put in its gates.

    Raises:
        StoreError: they cannot be read, or are not of this model.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except DAMAGED as error:
        raise StoreError(unreadable(path, error)) from None
    if any(map(is_gate, names)):
        load_gates(model.denoiser, str(path))
        return
    own = dict(model.denoiser.named_parameters())
    params = {name: own[name] for name in names if name in own}
    change = read_delta(path, params)
    where = {name: each.to(model.device) for name, each in change.items()}
    assign(params, snapshot(params), where)
