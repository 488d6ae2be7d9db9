"""unlearn(): the requests of a run, without a run directory and without a judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cu_runner.api.model import Edit, Model, add_change
from cu_runner.api.own_sequence import own_sequence
from cu_runner.api.settings import UNTUNED, check_name, composed
from cu_runner.concepts.requests import PlanName, Request
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.evaluate import check_labels, evaluate
from cu_runner.evaluators.metrics import unlearning_accuracy
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import snapshot, subtract
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.anchors import AnchorImages
from cu_runner.request.scope import Scope
from cu_runner.request.token_limit import check_prompts
from cu_runner.runner.early_stop import EarlyStop, LossLeft
from cu_runner.runner.recheck import train_again
from cu_runner.runner.training import Training, check_composition, erase
from cu_runner.runner.weights import TrainedWeights
from cu_runner.runtime.lazy import torch
from cu_runner.runtime.paths import config_dir
from cu_runner.runtime.progress import unseen
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


def unlearn(
    model: Model,
    concepts: str | Iterable[str] | None = None,
    *,
    method: str | Method[Any] = "conabl",
    regularizers: str | Regularizer | Iterable[str | Regularizer] = (),
    sequence: str | Sequence | None = None,
    setting: PlanName = "sequential",
    kind: str | None = None,
    anchors: Mapping[str, str] | None = None,
    prompts: Iterable[str] | None = None,
    captions: Iterable[str] | None = None,
    vocabulary: Iterable[str] | None = None,
    retain: Iterable[str] = (),
    seed: int = 0,
    settings: Mapping[str, object] | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Model:
    """Return a model that has unlearned concepts, one request after another.

    The given model stays as it is; the two share everything but the UNet. A model that has
    unlearned something goes on from there: unlearning two concepts in one call or in two is the
    same, to the last bit on a CPU, and so is `cu-run` with the same choices.

    Args:
        model: of load_model(), or what an earlier call returned.
        concepts: names, in order of request; of a sequence, its targets, and None is all of them
            that are not unlearned yet.
        method: a file of conf/method, or a Method.
        regularizers: files of conf/reg, or Regularizers, in hook order.
        sequence: a file of conf/sequence, or a Sequence: where prompts and anchors come from. None:
            the concepts are a person's own, and the next five say what is known of them.
        setting: sequential; simultaneous trains on all concepts together, from the untouched model;
            independent is what merging regularizers take by themselves.
        kind, anchors, prompts, captions, vocabulary, retain: as of own_sequence().
        seed: decides everything that is drawn.
        settings: what else a command line may set: {"train.steps": 100, "method.teacher": "base",
            "reg.l2.weight": 10}.
        on_step: is called after each training step. What it raises ends the call.
        progress: whether bars, and what was chosen, are shown on stderr.

    Raises:
        ConfigError, ValueError: choices that are unknown or do not go together. TrainingError: the
            loss is not finite.
    """
    names = [concepts] if isinstance(concepts, str) else concepts
    chosen = [regularizers] if isinstance(regularizers, str | Regularizer) else list(regularizers)
    with unseen(not progress):
        plan = compose_plan(model, method, chosen, sequence, setting, seed, settings)
        if sequence is None:
            if names is None:
                raise ConfigError("unlearn: names no concept; give concepts=[...] or sequence=NAME")
            about = {"kind": kind, "anchors": anchors, "prompts": prompts, "captions": captions}
            about |= {"vocabulary": vocabulary, "retain": tuple(retain)}
            own = own_sequence(model, names, **about, seed=seed)  # type: ignore[arg-type]
        else:
            own = sequence if isinstance(sequence, Sequence) else plan.sequence.build()
        new = targets_of(own, names, model)
        return Unlearning(model, plan, method, chosen, own, new, on_step).run(setting)


def compose_plan(
    model: Model,
    method: str | Method[Any],
    regularizers: list[str | Regularizer],
    sequence: str | Sequence | None,
    setting: PlanName,
    seed: int,
    settings: Mapping[str, object] | None,
) -> RunConfig:
    """Return the settings that `cu-run` would have with these choices. Raises ConfigError."""
    names = [each for each in regularizers if isinstance(each, str)]
    check_name("setting", setting)
    words = [*model.words, f"setting={setting}", f"seed={seed}", "wandb.mode=disabled"]
    named = isinstance(sequence, str)
    words.append(f"sequence={check_name('sequence', str(sequence))}" if named else UNTUNED)
    if isinstance(method, str):
        words.append(f"method={check_name('method', method)}")
    listed = ",".join(check_name("reg", name) for name in names)
    words.append(f"reg=[{listed}]" if len(names) > 1 else f"reg={listed or 'none'}")
    if setting == "simultaneous":
        words.append("setting.last_only=true")
    by_name = isinstance(method, str) and len(names) == len(regularizers)
    if named and not by_name and (config_dir() / "tuned" / f"{sequence}.yaml").exists():
        words.append("~tuned")  # settings that were found for others are not those of one's own
    return composed(words, settings)


def targets_of(sequence: Sequence, names: Iterable[str] | None, model: Model) -> list[Concept]:
    """Return the targets that a call unlearns, in order. Raises ConfigError."""
    known = {concept.name: concept for concept in sequence.targets}
    wanted = list(names) if names is not None else [n for n in known if n not in model.unlearned]
    if strange := [name for name in wanted if name not in known]:
        raise ConfigError(
            f"concepts: {strange[0]!r} is no target of sequence {sequence.name}; allowed: "
            f"{', '.join(known)}; leave sequence out for concepts of your own"
        )
    if again := [name for name in wanted if name in model.unlearned]:
        raise ConfigError(f"concepts: {again[0]!r} is unlearned already; leave it out")
    if not wanted or len(set(wanted)) < len(wanted):
        raise ConfigError(f"concepts: {wanted} is empty, or names one twice; name each once")
    return [known[name] for name in wanted]


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
            self.regularizers = {}
            for each in regularizers:
                named = isinstance(each, str)
                name = str(each) if named else type(each).__name__.lower()
                self.regularizers[name] = made[name] if isinstance(each, str) else each
        check_composition(self.method, self.regularizers)
        known = {concept.name for concept in model.targets}
        later = tuple(concept for concept in sequence.targets if concept.name not in known)
        self.sequence = dataclasses.replace(sequence, targets=(*model.targets, *later))
        self.diffusion: DiffusionModel = model.fresh()
        self.diffusion.speed_up(plan.spine.speed)
        if plan.spine.train.gradient_checkpointing:
            self.diffusion.checkpoint_gradients()
        check_prompts(self.diffusion, dataclasses.replace(sequence, targets=tuple(new)))
        own = self.regularizers.values()
        self.weights = TrainedWeights.of(self.diffusion, self.method, own, self.sequence)
        self.merges = any(each.independent_starts for each in own)

    def run(self, setting: PlanName) -> Model:
        """Serve the requests; return the model that has unlearned them."""
        if setting == "independent" and not self.merges:
            raise ConfigError(
                "setting='independent': every request starts from the untouched model, so that one "
                "model has only the last; choose sequential, or reg merge"
            )
        earlier = [edit.concept for edit in self.model.edits]
        listed = (*earlier, *self.new)
        plan: PlanName = "independent" if self.merges else setting
        if plan == "simultaneous":
            requests = [Request(1, plan, listed, is_only=len(listed) > 1)]
        else:
            numbers = range(len(earlier) + 1, len(listed) + 1)
            requests = [Request(number, plan, listed) for number in numbers]
        delta, edits = dict(self.model.delta), list(self.model.edits)
        if plan == "simultaneous":
            delta, edits = {}, []
        if self.merges and any(edit.own is None for edit in edits):
            raise ConfigError(
                "reg=merge merges requests that each start from the untouched model, and those "
                "before were not made so; begin with load_model()"
            )
        others = {name: change for name, change in delta.items() if name not in self.weights.params}
        add_change(self.diffusion, others)
        delta = {name: delta[name] for name in delta.keys() - others.keys()}
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
            delta={**others, **delta},
            edits=tuple(edits),
            targets=self.sequence.targets,
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
                return self.weights.place(merged)
        return None

    def scope(self, request: Request) -> Scope:
        """Return what methods and regularizers see of a request that starts with the weights."""
        return Scope(
            model=self.diffusion,
            sequence=self.sequence,
            request=request,
            params=self.weights.params,
            start=snapshot(self.weights.params),
            base=self.weights.base,
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

    def judge(self, request: Request) -> Callable[[], float]:
        """Return what measures UA for setting.stop_at, which alone needs a judge."""
        made: list[Evaluator] = []

        def measure() -> float:
            if not self.sequence.cross_retain:
                raise ConfigError(
                    "setting.stop_at measures UA, and concepts of your own have no judge; give "
                    "settings={'setting.stop_at': None}"
                )
            if not made:
                made.append(self.plan.evaluator.build(device=str(self.diffusion.device)))
                check_labels(self.sequence, made[0])
            told = (self.sequence, list(request.erased), request.index, self.plan.spine.eval)
            seen = evaluate(self.diffusion, made[0], *told)
            names = [concept.name for concept in request.erased]
            return unlearning_accuracy(seen.predictions, self.sequence.domain, names) or 0.0

        return measure
