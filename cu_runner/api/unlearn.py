"""unlearn(): the requests of a run, without a run directory and without a judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cu_runner.api.model import Model
from cu_runner.api.own_sequence import own_sequence
from cu_runner.api.settings import UNTUNED, check_name, composed, listed, refuse_idle
from cu_runner.api.unlearning import Step, Unlearning
from cu_runner.concepts.requests import PlanName
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.methods.base import Method
from cu_runner.regularizers.base import Regularizer
from cu_runner.runtime.devices import limit_threads
from cu_runner.runtime.paths import config_dir
from cu_runner.runtime.progress import note, unseen
from cu_runner.schema.errors import ConfigError

TAKEN = {"train", "anchors", "eval", "setting", "reg", "speed", "evaluator", "num_threads"}
IDLE = {
    "model": "it belongs to load_model()",
    "device": "it belongs to load_model()",
    "seed": "give seed=",
    "method": "the method is an object: make it with them",
    "sequence": "prompts are those of your own concepts, or of the Sequence given",
    "retention": "nothing is measured; evaluate() does that",
    "recovery": "nothing is measured; cu-eval does that",
}


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
    prompts: str | Iterable[str] | None = None,
    captions: str | Iterable[str] | None = None,
    vocabulary: str | Iterable[str] | None = None,
    retain: str | Iterable[str] = (),
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
        settings: what else a command line may set of the training: {"train.steps": 100,
            "method.teacher": "base", "reg.l2.weight": 10}. What would change nothing is refused.
        on_step: is called after each training step. What it raises ends the call.
        progress: whether bars, and what was chosen, are shown on stderr.

    Raises:
        ConfigError, ValueError: choices that are unknown or do not go together. TrainingError: the
            loss is not finite.
    """
    names = None if concepts is None else listed(concepts)
    chosen = [regularizers] if isinstance(regularizers, str | Regularizer) else list(regularizers)
    with unseen(not progress):
        plan = compose_plan(model, method, chosen, sequence, setting, seed, settings)
        if sequence is None:
            if names is None:
                raise ConfigError("unlearn: names no concept; give concepts=[...] or sequence=NAME")
            about = {"kind": kind, "anchors": anchors, "prompts": prompts, "captions": captions}
            about |= {"vocabulary": vocabulary, "retain": retain}
            own = own_sequence(model, names, **about, seed=seed)  # type: ignore[arg-type]
        else:
            own = sequence if isinstance(sequence, Sequence) else plan.sequence.build()
        new = targets_of(own, names, model)
        for line in plan.notes:
            note(line.replace(f"sequence={UNTUNED.partition('=')[2]}", "concepts of your own"))
        limit_threads(plan.spine.num_threads)
        return Unlearning(model, plan, method, chosen, own, new, on_step).run()


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
    own = {"method"} if isinstance(method, str) else set()
    own |= {"sequence"} if isinstance(sequence, str) else set()
    refuse_idle(settings, sorted(TAKEN | own), IDLE)
    check_name("setting", setting)
    words = [*model.words, f"setting={setting}", f"seed={seed}", "wandb.mode=disabled"]
    named = isinstance(sequence, str)
    words.append(f"sequence={check_name('sequence', str(sequence))}" if named else UNTUNED)
    if isinstance(method, str):
        words.append(f"method={check_name('method', method)}")
    chosen = ",".join(check_name("reg", name) for name in names)
    words.append(f"reg=[{chosen}]" if len(names) > 1 else f"reg={chosen or 'none'}")
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
