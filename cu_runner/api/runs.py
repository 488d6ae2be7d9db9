"""read_run(): a run directory, and the models of its steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cu_runner.api.model import Edit, Model, add_change, chosen_by
from cu_runner.api.settings import word
from cu_runner.concepts.sequence import Concept
from cu_runner.config.run_config import check_run
from cu_runner.models.parameters import is_gate
from cu_runner.runtime.devices import choose_device
from cu_runner.runtime.quiet import quiet_loading
from cu_runner.schema.errors import ConfigError, StoreError
from cu_runner.schema.values import ConfigTree
from cu_runner.store import run_record
from cu_runner.store.files import from_safetensors


class RunRecord(run_record.RunRecord):
    """A run directory, whose steps can be taken as models. read_run() makes one."""

    def model(
        self, step: int | None = None, *, device: str = "auto", path: str | None = None
    ) -> Model:
        """Return the model of a step, with the weights that the step was measured with.

        Args:
            step: number of the request; 0 is the untouched model, None the last finished one.
            device: auto, cpu, cuda or cuda:1 and so on.
            path: where the base model lies now; None is where the run had it.

        Raises:
            ConfigError: there is no such step. StoreError: its weights are damaged, or the base
                model is another.
        """
        last = len(self.records) - 1
        step = last if step is None else step
        if not 0 <= step <= last:
            raise ConfigError(f"step={step}: {self.directory} has steps 0 to {last}")
        config: ConfigTree = {**self.config, "device": device}
        if path is not None:
            config["model"] = {**config["model"], "path": path}
        plan = check_run(config, self.method)
        with quiet_loading():
            diffusion = plan.model.build(device=choose_device(plan.spine))
        diffusion.speed_up(plan.spine.speed)
        if diffusion.fingerprint() != self.records[0].model_sha256:
            raise StoreError(
                f"{self.directory}: was made with another model; restore it or give path=..."
            )
        model = Model(diffusion, tuple(words_of(config)))
        if step == 0:
            return model
        self.require_weights(step)
        delta = from_safetensors(self.weights(step).read_bytes())
        delta = {name: change.to(diffusion.device) for name, change in delta.items()}
        edited = model.fresh()
        edited.speed_up(plan.spine.speed)
        add_change(edited, delta)
        sequence = plan.sequence.build()
        known = {concept.name: concept for concept in sequence.targets}
        edits = [self._edit(known[name]) for name in self.unlearned(step)]
        targets = sequence.targets if any(map(is_gate, delta)) else tuple(e.concept for e in edits)
        return dataclasses.replace(
            model, diffusion=edited, origin=model, delta=delta, edits=tuple(edits), targets=targets
        )

    def _edit(self, concept: Concept) -> Edit:
        training = self.records[self.requested[concept.name]].training
        names = tuple(self.config["reg"])
        record = {"method": training.method, "regularizers": training.regularizers}
        return Edit(concept, self.method, names, training.steps, [], record)


def words_of(config: ConfigTree) -> list[str]:
    """Return the choices of conf/model that a run's configuration holds, for later requests."""
    own = {key: value for key, value in config["model"].items() if key != "_target_"}
    chosen = chosen_by(str(own["path"]), None)[:1]
    return [*chosen, *(word(f"++model.{key}", value) for key, value in own.items())]


def read_run(directory: str | Path) -> RunRecord:
    """Read a run directory.

    Raises:
        StoreError: it is none, or its chain of steps is broken.
    """
    found = run_record.read_run(Path(directory))
    return RunRecord(found.directory, found.config, found.records, found.command)
