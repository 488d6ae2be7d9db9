"""read_run(): a run directory, and the models of its steps."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from cu_runner.api.model import Edit, Model, add_change, chosen_by
from cu_runner.api.settings import word
from cu_runner.concepts.sequence import Concept
from cu_runner.config.run_config import check_run
from cu_runner.models.parameters import is_gate
from cu_runner.regularizers.gate import words_of as gate_words
from cu_runner.runner.finished import load_step, prove_step, trained_run
from cu_runner.runtime.devices import choose_device
from cu_runner.runtime.quiet import quiet_loading
from cu_runner.schema.values import ConfigTree
from cu_runner.store import run_record
from cu_runner.store.files import from_safetensors


class RunRecord(run_record.RunRecord):
    """A run directory, whose steps can be taken as models. read_run() makes one."""

    def model(
        self,
        step: int | None = None,
        *,
        device: str = "auto",
        path: str | None = None,
        shared: str | None = None,
        preset: str | None = None,
        allow_modules: tuple[str, ...] = (),
    ) -> Model:
        """Return the model of a step, with the weights that the step was measured with.

        Args:
            step: number of the request; 0 is the untouched model, None the last finished one.
            device: auto, cpu, cuda or cuda:1 and so on.
            path: where the base model lies now; None is where the run had it.
            shared: where the parts lie now that the base model lacks (model.shared).
            preset: the file of conf/model whose training settings later calls of unlearn() take;
                None is that of the recorded command, or what the files fit.
            allow_modules: modules of yours that the run was made with.

        Raises:
            ValueError: there is no such step. StoreError: what the step says of itself does not
                hold, or the base model is another.
        """
        step = len(self.records) - 1 if step is None else step
        prove_step(self, step)
        config: ConfigTree = {**self.config, "device": device}
        moved = {"path": path, "shared": shared}
        moved = {key: place for key, place in moved.items() if place is not None}
        config["model"] = {**config["model"], **moved}
        plan = check_run(config, self.method, allowed=allow_modules)
        with quiet_loading():
            untouched = load_step(
                self, 0, device=choose_device(plan.spine), config=config, allowed=allow_modules
            )
        untouched.speed_up(plan.spine.speed)
        chosen = preset or preset_of(self.command)
        model = Model(untouched, tuple(words_of(self.config, config, chosen)))
        if step == 0:
            return model
        delta = from_safetensors(trained_run(self).weights(step).read_bytes())
        delta = {name: change.to(untouched.device) for name, change in delta.items()}
        edited = model.fresh()
        edited.speed_up(plan.spine.speed)
        add_change(edited, delta)
        sequence = plan.sequence.build()
        known = {concept.name: concept for concept in sequence.targets}
        edits = [self._edit(known[name]) for name in self.unlearned(step)]
        gated = any(map(is_gate, delta))
        return dataclasses.replace(
            model,
            diffusion=edited,
            origin=model,
            delta=delta,
            edits=tuple(edits),
            targets=sequence.targets if gated else tuple(edit.concept for edit in edits),
            gates=tuple(gate_words(sequence.targets, plan.method.build())) if gated else (),
        )

    def _edit(self, concept: Concept) -> Edit:
        training = self.records[self.requested[concept.name]].training
        names = tuple(self.config["reg"])
        record = {"method": training.method, "regularizers": training.regularizers}
        return Edit(concept, self.method, names, training.steps, [], record)


def preset_of(command: str | None) -> str | None:
    """Return the model that a recorded command chooses by name; None if it does not."""
    words = shlex.split(command or "")
    named = [word.removeprefix("model=") for word in words if word.startswith("model=")]
    return named[-1] if named else None


def words_of(own: ConfigTree, now: ConfigTree, preset: str | None) -> list[str]:
    """Return the choices of conf/model that a run's configuration holds, for later requests.

    Args:
        own: the run's configuration, by whose place of the model a preset is found.
        now: the same, with the place where the model is now.
        preset: the preset, where it is known.
    """
    chosen = chosen_by(str(own["model"]["path"]), preset)[:1]
    settings = {key: value for key, value in now["model"].items() if key != "_target_"}
    return [*chosen, *(word(f"++model.{key}", value) for key, value in settings.items())]


def read_run(directory: str | Path) -> RunRecord:
    """Read a run directory.

    Raises:
        StoreError: it is none, or its chain of steps is broken.
    """
    found = run_record.read_run(Path(directory))
    return RunRecord(found.directory, found.config, found.records, found.command)
