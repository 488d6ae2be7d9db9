"""One call of unlearn(): its weights, and the requests that change them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cu_runner.api.model import Edit, Model, add_change
from cu_runner.concepts.requests import PlanName, Request
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.evaluate import check_labels, evaluate
from cu_runner.evaluators.metrics import forgotten_of, measured_by
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import snapshot, subtract
from cu_runner.regularizers.base import Regularizer
from cu_runner.regularizers.gate import words_of
from cu_runner.request.anchors import AnchorImages
from cu_runner.request.scope import Scope
from cu_runner.request.token_limit import check_prompts
from cu_runner.runner.early_stop import EarlyStop, LossLeft
from cu_runner.runner.own_images import check_pictured
from cu_runner.runner.parts import check_linear, check_words, named, prepare
from cu_runner.runner.recheck import train_again
from cu_runner.runner.training import Training, check_composition, erase
from cu_runner.runner.weights import TrainedWeights, choose
from cu_runner.runtime.lazy import torch
from cu_runner.runtime.seeding import RandomSource
from cu_runner.runtime.signals import StopSignals
from cu_runner.schema.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """What a callback is told after each training step.

    request: its number, from 1. concept: its name. step: from 1. steps: how many there will be at
    most. loss: with the penalties. logs: everything that the step logged.
    """

    request: int
    concept: str
    step: int
    steps: int
    loss: float
    logs: dict[str, float]


class Unlearning:
    """One call of unlearn(): its weights, and the requests that change them."""

    def __init__(
        self,
        model: Model,
        plan: RunConfig,
        method: str | Method[Any],
        regularizers: list[str | Regularizer],
        sequence: Sequence,
        new: list[Concept],
        on_step: Callable[[Step], None] | None,
    ) -> None:
        """Build what is asked for and copy the UNet. Raises ValueError for what does not fit."""
        self.model, self.plan, self.new, self.on_step = model, plan, new, on_step
        self.method = plan.method.build() if isinstance(method, str) else method
        self.method_name = plan.method_name if isinstance(method, str) else type(method).__name__
        made = {name: node.build() for name, node in plan.regularizers.items()}
        self.regularizers = dict(made)
        if any(not isinstance(each, str) for each in regularizers):
            self.regularizers = by_name(regularizers, made)
        check_composition(self.method, self.regularizers, plan.spine.train)
        self.method.check(sequence)
        check_pictured(self.method_name, self.method, sequence)
        chosen = named(self.method_name, self.method, self.regularizers)
        check_words(model.diffusion, chosen)
        check_linear(model.diffusion, self.method, chosen)
        known = {concept.name for concept in model.targets}
        later = tuple(concept for concept in sequence.targets if concept.name not in known)
        self.sequence = dataclasses.replace(sequence, targets=(*model.targets, *later))
        self.diffusion: DiffusionModel = model.fresh()
        prepare(self.diffusion, plan.spine.speed, plan.spine.train)
        check_prompts(self.diffusion, dataclasses.replace(sequence, targets=tuple(new)))
        own = list(self.regularizers.values())
        self.merges = any(each.independent_starts for each in own)
        self.check_earlier(sequence)
        self.begun = {} if plan.setting.plan == "simultaneous" else dict(model.delta)
        trained = choose(self.diffusion, self.method, own, self.sequence)
        # before TrainedWeights lowers the precision of what is not trained
        self.others = {name: self.begun[name] for name in self.begun if name not in trained}
        self.untouched = untouched_values(model, self.others)
        add_change(self.diffusion, self.others)
        self.weights = TrainedWeights.of(self.diffusion, self.method, own, self.sequence)
        gated = any(each.has_weights for each in own)
        self.gates = tuple(words_of(self.sequence.targets, self.method)) if gated else model.gates
        self.check_gates(gated)

    def check_earlier(self, sequence: Sequence) -> None:
        """Refuse with ConfigError what cannot go on from the requests that the model has served."""
        plan, edits = self.plan.setting.plan, self.model.edits
        if self.method.whole_sequence:
            raise ConfigError(
                f"method={self.method_name}: trains nothing; load_model() reads a checkpoint that "
                "another tool unlearned"
            )
        if plan == "independent" and not self.merges:
            raise ConfigError(
                "setting='independent': every request starts from the untouched model, so that one "
                "model has only the last; choose sequential, or reg merge"
            )
        if plan == "simultaneous" and len(sequence.by_domain) > 1:
            raise ConfigError(
                "setting='simultaneous': its batches are of one set of prompts, and the sequence "
                "has targets of several domains; choose sequential"
            )
        known = {concept.name for concept in sequence.targets}
        strange = [edit.concept.name for edit in edits if edit.concept.name not in known]
        again = self.method.closed_form or plan == "simultaneous" or self.plan.setting.recheck
        if strange and again:
            raise ConfigError(
                f"concepts: {strange[0]!r} was unlearned in other prompts, and closed forms, "
                "setting='simultaneous' and setting.recheck train on it again; give a "
                "sequence that has it among its targets, or begin with load_model()"
            )
        own = [edit.own for edit in edits if edit.own is not None]
        names = self.method.weights(self.diffusion).keys()
        if self.merges and (len(own) < len(edits) or any(each.keys() != names for each in own)):
            raise ConfigError(
                "reg=merge merges changes of the same weights by requests that each start from the "
                "untouched model, and those before were not made so; begin with load_model()"
            )

    def check_gates(self, gated: bool) -> None:
        """Refuse with ConfigError gates for other words than those that the model has."""
        before = self.model.gates
        own = {(concept.name, concept.prompt_name) for concept in self.new}
        if gated and (self.gates[: len(before)] != before or not own <= {*self.gates}):
            raise ConfigError(
                "reg=gate: the model's gates are for other words of its concepts, or for another "
                "spelling; give the same method.also_called and names as before, or begin with "
                "load_model()"
            )

    def run(self) -> Model:
        """Serve the requests; return the model that has unlearned them."""
        earlier = [edit.concept for edit in self.model.edits]
        asked = (*earlier, *self.new)
        plan: PlanName = "independent" if self.merges else self.plan.setting.plan
        edits = list(self.model.edits)
        if plan == "simultaneous":
            requests, edits = [Request(1, plan, asked, is_only=len(asked) > 1)], []
        else:
            numbers = range(len(earlier) + 1, len(asked) + 1)
            requests = [Request(number, plan, asked) for number in numbers]
        delta = {name: self.begun[name] for name in self.begun.keys() - self.others.keys()}
        for request in requests:
            delta, found = self.serve(request, delta, edits)
            edits += found
        self.weights.set(delta)
        for parameter in self.weights.params.values():
            parameter.requires_grad_(False)
        return dataclasses.replace(
            self.model,
            diffusion=self.diffusion,
            origin=self.model.untouched,
            delta={**self.others, **delta},
            edits=tuple(edits),
            targets=self.sequence.targets,
            gates=self.gates,
        )

    def serve(
        self, request: Request, delta: dict[str, Tensor], edits: list[Edit]
    ) -> tuple[dict[str, Tensor], list[Edit]]:
        """Serve one request; return the change from the untouched weights, and what was done."""
        weights = self.weights
        weights.set(None)
        if request.start == "previous" and delta:
            add_change(self.diffusion, delta)
        scope = self.scope(request)
        setting = self.plan.setting
        early_stop = EarlyStop(setting, self.judge(request), (), LossLeft(scope, self.method))

        def after_step(training: Training) -> None:
            training.ended = early_stop(training.done)
            if self.on_step is not None:
                logs = dict(training.last)
                place = (request.index, request.label, training.done, training.steps)
                self.on_step(Step(*place, logs["loss"], logs))

        train = self.plan.spine.train
        report = erase(scope, self.method, self.regularizers, train, after_step)
        told = (self.plan, self.method, self.regularizers)
        again = train_again(request, *told, self.scope, StopSignals())
        own = subtract(weights.params, weights.base)
        merged = self.merge(scope, own, edits)
        record = {"method": report.method, "regularizers": report.regularizers, "again": again}
        names = tuple(self.regularizers)
        made = [
            Edit(
                concept,
                self.method_name,
                names,
                len(report.logs),
                report.logs,
                record,
                {name: change.cpu() for name, change in own.items()} if self.merges else None,
            )
            for concept in (request.targets if request.is_only else request.targets[-1:])
        ]
        return (own if merged is None else merged), made

    def merge(
        self, scope: Scope, own: dict[str, Tensor], edits: list[Edit]
    ) -> dict[str, Tensor] | None:
        """Return what a regularizer makes of this change and earlier ones; None if none does."""

        def deltas(name: str) -> Tensor:
            rows = [edit.own[name].to(own[name]) for edit in edits if edit.own is not None]
            return torch.stack([*rows, own[name]]).cpu()

        for regularizer in self.regularizers.values():
            if (merged := regularizer.post_request(list(own), deltas, scope)) is not None:
                return self.weights.given_back(regularizer, merged)
        return None

    def scope(self, request: Request) -> Scope:
        """Return what methods and regularizers see of a request that starts with the weights."""
        return Scope(
            model=self.diffusion,
            sequence=self.sequence.facing(request.targets[-1]),
            request=request,
            params=self.weights.params,
            start=snapshot(self.weights.params),
            base={**self.weights.base, **self.untouched},
            rng=RandomSource(self.plan.spine.seed, request.number),
            train=self.plan.spine.train,
            anchors=self.anchors,
        )

    def anchors(self, prompts: list[str], number: int, *, mirrored: bool = False) -> Tensor:
        """Return latents of the untouched model's images of prompts, as Scope.anchors says."""
        untouched, spine = self.model.untouched, self.plan.spine
        # the cache is that of the untouched model alone, which its key need not name
        told = (spine.anchors, untouched.cache, spine.eval.batch_size)
        images = AnchorImages(untouched.diffusion, "", {}, {}, *told)
        return images.latents(prompts, number, mirrored=mirrored)

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        """Return what names the content of images, loaded once for all requests."""
        made = self.plan.evaluator.build(device=str(self.diffusion.device))
        check_labels(self.sequence, made)
        return made

    def judge(self, request: Request) -> Callable[[], float]:
        """Return what measures UA for setting.stop_at, which alone needs a judge.

        Raises ConfigError where it is asked for and there is none.
        """
        if self.plan.setting.stop_at is not None and not self.sequence.cross_retain:
            raise ConfigError(
                "setting.stop_at measures UA, and concepts of your own have no judge; give "
                "settings={'setting.stop_at': None}"
            )

        def measure() -> float:
            told = (self.sequence, list(request.erased), request.index, self.plan.spine.eval)
            seen = evaluate(self.diffusion, self.evaluator, *told)
            names = [concept.name for concept in request.erased]
            return forgotten_of(seen.predictions, measured_by(self.sequence), names) or 0.0

        return measure


def by_name(
    chosen: list[str | Regularizer], made: Mapping[str, Regularizer]
) -> dict[str, Regularizer]:
    """Return regularizers by name, in hook order; an object is named after its class.

    Args:
        made: those that were chosen by name.

    Raises:
        ConfigError: two have one name.
    """
    found: dict[str, Regularizer] = {}
    for each in chosen:
        name = each if isinstance(each, str) else type(each).__name__.lower()
        if name in found:
            raise ConfigError(
                f"regularizers: two are called {name}; give one, or a class of another name"
            )
        found[name] = made[each] if isinstance(each, str) else each
    return found


def untouched_values(model: Model, names: Iterable[str]) -> dict[str, Tensor]:
    """Return weights of the untouched UNet, by name; gates, which it has not, are shut there."""
    own = dict(model.untouched.diffusion.denoiser.named_parameters())
    return {
        name: own[name].detach() if name in own else torch.zeros_like(model.delta[name])
        for name in names
    }
