"""A run's stored weights measured again, as another configuration says. Nothing is trained.

The result is a run directory of its own, with predictions, grids and metrics of every step but no
weights. It resumes, and what is complete is not made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.recovered import RECOVERED
from cu_runner.runner.finished import refuse_other_model
from cu_runner.runner.measure import Instruments
from cu_runner.runner.probing import Prober, build_probes, check_probes
from cu_runner.runner.weights import TrainedWeights
from cu_runner.runtime.devices import choose_device, device_name, limit_threads
from cu_runner.runtime.provenance import made_with
from cu_runner.schema.values import without_paths
from cu_runner.store.cache import Cache
from cu_runner.store.directories import first_name
from cu_runner.store.files import to_safetensors
from cu_runner.store.layout import GRID, METRICS, PREDICTIONS
from cu_runner.store.records import UNMEASURED, Metrics, StepRecord, StepResult
from cu_runner.store.run_directory import RunStore
from cu_runner.store.run_record import RunRecord
from cu_runner.store.signature import signature

if TYPE_CHECKING:
    from torch import Tensor

Loaded = tuple[Instruments, TrainedWeights, Cache]


def load(run: RunRecord, plan: RunConfig) -> Loaded:
    """Load what measures, and the weights that the run trained.

    Raises:
        StoreError: another model than the run's. What loading raises.
    """
    device, spine = choose_device(plan.spine), plan.spine
    limit_threads(spine.num_threads)
    model, evaluator = plan.model.build(device=device), plan.evaluator.build(device=device)
    model.speed_up(spine.speed)
    refuse_other_model(run, model)
    retention = plan.retention.build(device=device) if plan.retention else None
    cache = Cache(Path(spine.paths.outputs) / "cache", plan.code)
    judges = (evaluator, plan.sequence.build(), retention)
    instruments = Instruments.begin(model, *judges, spine.eval, cache)
    regularizers = [node.build() for node in plan.regularizers.values()]
    weights = TrainedWeights.of(model, plan.method.build(), regularizers, plan.sequence.build())
    return instruments, weights, cache


def measure_again(
    run: RunRecord, plan: RunConfig, store: RunStore, loaded: Loaded | None = None
) -> Iterator[StepRecord]:
    """Yield every finished step of the run, measured as the plan says.

    Those that are there already come from the store.

    Args:
        loaded: by load(); loaded here without one, when a step is not there yet.

    Raises:
        StoreError: weights that are damaged or do not fit the model, or another model than the
            run's.
    """
    steps = store.finished()
    yield from steps
    if len(steps) == len(run.records):
        return
    sequence = plan.sequence.build()
    known = {concept.name: concept for concept in sequence.targets}
    measured = {
        index: [known[name] for name in run.unlearned(index)] if index else []
        for index in range(len(steps), len(run.records))
    }
    for index, unlearned in measured.items():
        label = run.records[index].row.concept or "no request"
        plan.require_shown(sequence, label, unlearned if index else sequence.targets)
    instruments, weights, cache = loaded or load(run, plan)
    probes = build_probes(plan, sequence)
    check_probes(probes, instruments.model, sequence, plan.spine.eval)
    prober = Prober.of(plan, probes, store, instruments, weights, cache)
    own = seen_by_run(run, plan, instruments)
    for index, unlearned in measured.items():
        started, record = time.monotonic(), run.records[index]
        path = run.weights(index)
        if index:
            run.require_weights(index)
            weights.set(weights.read(path))
        files: dict[str, bytes] = {}
        metrics = dict(UNMEASURED)
        spent = {"train": 0.0, "eval": 0.0}
        if plan.spine.eval.is_due(index, run.num_requests):
            files, metrics = own.get(index) or instruments.measure(
                index, unlearned, record.row.concept, base=store.step_dir(0) if index else None
            )
            spent["eval"] = time.monotonic() - started
            shown = unlearned if index else []
            files, metrics = prober.add(index, shown, files, metrics, spent)
        seconds = round(spent["eval"], 2)
        result = StepResult(
            index=index,
            files=files,
            row=dataclasses.replace(record.row, metrics=metrics, eval_seconds=seconds),
            targets=record.targets,
            **instruments.hashes(),
            training=record.training,
            seconds={**spent},
            **vars(made_with(instruments.model.device)),
            run_sha256=record.sha256,
            weights=os.path.relpath(path, store.directory) if index else None,
            run_code=record.code,
        )
        steps.append(store.save_step(result, steps[-1] if steps else None))
        yield steps[-1]


def seen_by_run(
    run: RunRecord, plan: RunConfig, instruments: Instruments
) -> dict[int, tuple[dict[str, bytes], Metrics]]:
    """Return files and metrics of the steps, by step, where they need not be made again.

    That is where probes alone are other ones: the run has drawn the same images, by the same code.
    """
    shown = ("model", "evaluator", "sequence", "eval", "retention")
    asked, made = (without_paths(each, ("eval.every",)) for each in (plan.resolved, run.config))
    same = all(asked.get(key) == made.get(key) for key in shown)
    # a file of prompts that was edited since gives the same configuration another signature
    same = same and first_name(run.directory.name).endswith(signature(run.config)[:8])
    if not same or not plan.probes:
        return {}
    found: dict[int, tuple[dict[str, bytes], Metrics]] = {}
    for index, record in enumerate(run.records):
        by_this_code = record.code.images_sha256 == plan.code.images_sha256 and record.evaluated
        by_these = all(vars(record)[name] == now for name, now in instruments.hashes().items())
        if by_this_code and by_these and record.device == device_name(instruments.model.device):
            files = {}
            for name in (PREDICTIONS, GRID, METRICS):
                run.require(index, name)
                files[name] = (run.step_dir(index) / name).read_bytes()
            own = record.row.metrics.items()  # what the run's probes saw is theirs
            metrics = {name: value for name, value in own if not RECOVERED.fullmatch(name)}
            found[index] = files, metrics
    return found


def measure_change(
    run: RunRecord, index: int, change: dict[str, Tensor], loaded: Loaded, cache: Cache
) -> Metrics:
    """Measure a change of the untouched model's weights as if a request of the run had made it.

    Args:
        index: of the request: UA is over what the run had unlearned with it.
        change: theta - theta_base, of every weight that the run trains.
        loaded: by load(); its weights are left as they are measured.
        cache: keeps what is seen in the images.
    """
    instruments, weights, _ = loaded
    change = weights.place(change)
    weights.set(change)
    known = {concept.name: concept for concept in instruments.sequence.targets}
    unlearned = [known[name] for name in run.unlearned(index)]
    digest = hashlib.sha256(to_safetensors(change)).hexdigest()
    label = run.records[index].row.concept
    return instruments.measure(index, unlearned, label, cache, change=digest)[1]
