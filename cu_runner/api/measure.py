"""evaluate(): what a model has forgotten and kept, in one object."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

from cu_runner.api.model import Model
from cu_runner.api.settings import UNTUNED, check_name, composed, refuse_idle
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.metrics import measured_by, read_predictions, shown_in
from cu_runner.reporting.intervals import over_images
from cu_runner.runner.measure import Instruments
from cu_runner.runtime.devices import limit_threads
from cu_runner.runtime.lazy import pd
from cu_runner.runtime.progress import unseen
from cu_runner.schema.errors import ConfigError
from cu_runner.store.layout import GRID, PREDICTIONS

IDLE = {
    "model": "it belongs to load_model()",
    "device": "it belongs to load_model()",
    "sequence": "the sequence is an object: change it itself",
    "evaluator": "the evaluator is an object: change it itself",
}
SHOWN = {"UA": "UA", "RA_I": "RA-I", "RA_C": "RA-C"}


@dataclass(frozen=True)
class Evaluation:
    """What evaluate() measured.

    metrics: UA, RA_I, RA_C and more in percent, as a row of metrics.csv; None where not measured.
    intervals: both ends of the 95% interval over images (Wilson 1927) of these three.
    predictions: one row per image, as predictions.csv. grid: a picture of every concept.
    unlearned: the concepts that UA is over; none of an untouched model, whose UA is the base rate:
    that of all targets.
    """

    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    predictions: pd.DataFrame
    grid: Image.Image
    unlearned: tuple[str, ...]

    def __str__(self) -> str:
        """Return the three numbers with their intervals, on one line."""
        parts = []
        for name, shown in SHOWN.items():
            value = self.metrics[name]
            if value is not None:
                low, high = self.intervals[name]
                parts.append(f"{shown} {value:.1f} ({low:.1f} to {high:.1f})")
        return "  ".join(parts)


def evaluate(
    model: Model,
    sequence: str | Sequence,
    *,
    evaluator: str | Evaluator | None = None,
    settings: Mapping[str, object] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure a model on a sequence, as `cu-run` does after a request.

    Args:
        model: untouched or edited. UA is over those of its concepts that are targets of the
            sequence.
        sequence: a file of conf/sequence, or a Sequence.
        evaluator: a file of conf/evaluator, or an Evaluator; None is the default of `cu-run`.
        settings: what else a command line may set: {"eval.batch_size": 16,
            "evaluator.paths.style": "/models/style_vit"}.
        progress: whether a bar is shown.

    Raises:
        ConfigError, ValueError: choices that are unknown or do not go together: the evaluator does
            not know a concept. SamplingError: an image is not finite.
    """
    named = isinstance(sequence, str)
    own = {"evaluator"} if not isinstance(evaluator, Evaluator) else set()
    own |= {"sequence"} if named else set()
    refuse_idle(settings, sorted({"eval", "num_threads", *own}), IDLE)
    words = [*model.words, "wandb.mode=disabled"]
    words.append(f"sequence={check_name('sequence', str(sequence))}" if named else UNTUNED)
    if isinstance(evaluator, str):
        words.append(f"evaluator={check_name('evaluator', evaluator)}")
    with unseen(not progress):
        plan = composed(words, settings)
        chosen = sequence if isinstance(sequence, Sequence) else plan.sequence.build()
        if not chosen.retained or not chosen.cross_retain:
            raise ConfigError(
                f"evaluate: sequence {chosen.name} has no retained concepts or no other domain: "
                "nothing says what was kept; give a file of conf/sequence, or make_sequence(...)"
            )
        device = str(model.diffusion.device)
        limit_threads(plan.spine.num_threads)
        judge = (
            evaluator if isinstance(evaluator, Evaluator) else plan.evaluator.build(device=device)
        )
        told = (judge, chosen, None, plan.spine.eval, model.untouched.cache)
        instruments = Instruments.begin(model.diffusion, *told)
        gone = set(model.unlearned)
        unlearned = [concept for concept in chosen.targets if concept.name in gone]
        order = {name: place for place, name in enumerate(model.unlearned)}
        unlearned.sort(key=lambda concept: order[concept.name])
        if model.edits and not unlearned:
            raise ConfigError(
                f"evaluate: the model has unlearned {', '.join(model.unlearned)}, none of which is "
                f"a target of sequence {chosen.name}; choose another sequence"
            )
        for lacking in chosen.lacks(unlearned or chosen.targets):
            raise ConfigError(
                f"evaluate: no image shows {chosen.cross_domain} {lacking!r}, and RA-C needs every "
                "entry of cross_retain; add rows to sequence.prompts"
            )
        label = unlearned[-1].name if unlearned else ""
        files, metrics = instruments.measure(len(unlearned), unlearned, label)
    table = read_predictions(io.BytesIO(files[PREDICTIONS]))
    return Evaluation(
        dict(metrics),
        intervals(table, metrics, unlearned or list(chosen.targets), chosen),
        table,
        Image.open(io.BytesIO(files[GRID])),
        tuple(concept.name for concept in unlearned),
    )


def intervals(
    table: pd.DataFrame,
    metrics: Mapping[str, float | None],
    erased: list[Concept],
    sequence: Sequence,
) -> dict[str, tuple[float, float]]:
    """Return the 95% interval over images of every one of UA, RA_I and RA_C that was measured."""
    shown = shown_in(table, measured_by(sequence))[0]
    domains = {concept.domain for concept in erased}
    kept = [concept.name for concept in sequence.retained if concept.domain in domains]
    numbers = {
        "UA": int(shown.isin([concept.name for concept in erased]).sum()),
        "RA_I": int(shown.isin(kept).sum()),
        "RA_C": int(shown.isin([*kept, *(concept.name for concept in erased)]).sum()),
    }
    return {
        name: over_images(value, numbers[name])
        for name in SHOWN
        if (value := metrics[name]) is not None
    }
