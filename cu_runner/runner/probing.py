"""How the runner, and cu-eval after it, let the probes of recovery at a step."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.evaluate import Judge
from cu_runner.evaluators.metrics import read_predictions
from cu_runner.evaluators.recovered import CONTROLS
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.recovery.base import Probe
from cu_runner.recovery.battery import Battery
from cu_runner.runner.measure import Instruments
from cu_runner.runner.weights import TrainedWeights
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import ConfigError, StoreError
from cu_runner.schema.settings import EvalSettings
from cu_runner.store.cache import Cache
from cu_runner.store.files import to_json
from cu_runner.store.layout import METRICS, PREDICTIONS
from cu_runner.store.records import Metrics, Row, name_requests
from cu_runner.store.run_directory import RunStore

WHEN = ("every", "controls")  # arguments that do not change what is seen of one concept


def build_probes(plan: RunConfig, sequence: Sequence) -> dict[str, Probe]:
    """Build the probes of recovery. Raises ValueError for what they cannot probe."""
    probes = {name: node.build() for name, node in plan.probes.items()}
    for name, probe in probes.items():
        for facing in sequence.by_domain:
            probe.check(facing)
        require_evaluated(name, probe, plan.spine.eval, len(plan.requests(sequence)))
    return probes


def require_evaluated(name: str, probe: Probe, evaluated: EvalSettings, last: int) -> None:
    """Refuse with ConfigError a probe that is due after a request that is not evaluated."""
    due = [request for request in range(1, last + 1) if probe.is_due(request, last)]
    needed = range(1, last + 1) if probe.reads_earlier else due
    if lacking := [request for request in needed if not evaluated.is_due(request, last)]:
        what, other = "is due then", f"recovery.{name}.every=last"
        if probe.reads_earlier:
            what, other = "reads what was seen after every request", "leave the probe out"
        raise ConfigError(
            f"recovery.{name}: eval.every={evaluated.every} leaves out {name_requests(lacking)}, "
            f"and the probe {what}; give eval.every=1, or {other}"
        )


def check_probes(
    probes: dict[str, Probe], model: DiffusionModel, sequence: Sequence, settings: EvalSettings
) -> None:
    """Raise ValueError for what the probes cannot do with a model."""
    for probe in probes.values():
        for facing in sequence.by_domain:
            probe.check_model(model, facing, settings)


@dataclass(frozen=True)
class Prober:
    """What lets the probes of a run at its steps; without probes it does nothing.

    store: the run, with the steps before the one that is probed. last: its last request.
    """

    battery: Battery | None
    store: RunStore
    last: int

    @staticmethod
    def of(
        plan: RunConfig,
        probes: dict[str, Probe],
        store: RunStore,
        own: Instruments,
        weights: TrainedWeights,
        cache: Cache,
    ) -> Prober:
        """Take the probes, the run, what measures it, and the weights that it trains."""
        last = len(plan.requests(plan.sequence.build()))
        if not probes:
            return Prober(None, store, last)
        settings: dict[str, dict[str, object]] = {}
        for name, node in plan.probes.items():
            arguments = plan.resolved["recovery"][name]
            settings[name] = {key: value for key, value in arguments.items() if key not in WHEN}
            settings[name]["files"] = plan.files_of(node)
        judge = Judge(own.model, own.evaluator, own.sequence, own.settings)
        hashes = (own.model_sha256, own.evaluator_sha256)
        placed = (weights.params, weights.base)
        return Prober(Battery(probes, settings, judge, *hashes, *placed, cache), store, last)

    def add(
        self,
        index: int,
        unlearned: Ordered[Concept],
        files: dict[str, bytes],
        metrics: Metrics,
        seconds: dict[str, float],
    ) -> tuple[dict[str, bytes], Metrics]:
        """Return the files and the metrics of a step with those that the probes add.

        Args:
            index: of the step.
            unlearned: concepts that the weights have unlearned.
            files, metrics: of the step without recovery.
            seconds: of the step; gets those of the probes.
        """
        if self.battery is None:
            return files, metrics
        started = time.monotonic()

        def predictions(step: int) -> pd.DataFrame:
            if step == index:
                return read_predictions(io.BytesIO(files[PREDICTIONS]))
            place = self.store.step_dir(step) / PREDICTIONS
            if not place.exists():  # the run went on with another eval.every
                raise StoreError(
                    f"{place.parent}: was not evaluated, and a probe reads it; run without that "
                    "probe, or anew with fresh=true eval.every=1"
                )
            return read_predictions(place)

        ua = metrics["UA"]
        seen, found = self.battery.measure(index, self.last, unlearned, predictions, ua)
        seconds["recovery"] = time.monotonic() - started
        metrics = metrics | found
        return files | seen | {METRICS: to_json(metrics)}, metrics

    def describe(self, row: Row) -> str:
        """Return the line that the terminal shows of the probes at a step; "" where none was due.

        Each accuracy stands beside its two controls.
        """
        return describe_recovery(row, self.battery.probes if self.battery else ())


def describe_recovery(row: Row, probes: Iterable[str]) -> str:
    """Return the line of Prober.describe() for probes by name."""
    parts = []
    for name in probes:
        values = [row.metrics.get(f"recovered_{name}{ending}") for ending in CONTROLS]
        said = [
            f"{word}{value:.1f}"
            for word, value in zip(("", "untouched ", "retained "), values, strict=True)
            if value is not None
        ]
        if values[0] is not None:
            parts.append(f"{name} {said[0]}" + (f" ({', '.join(said[1:])})" if said[1:] else ""))
    worst = row.metrics.get("UA_worst")
    ending = "" if worst is None else f"; worst UA {worst:.1f}"
    return f"recovered: {', '.join(parts)}{ending}" if parts else ""
