"""The parts of a run, built from its checked configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cu_runner.concepts.requests import Request
from cu_runner.concepts.sequence import Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.evaluate import check_labels
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.recovery.base import Probe
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.token_limit import check_prompts
from cu_runner.retention.base import Retention
from cu_runner.runner.own_images import check_pictured, picture_folders, read_whole
from cu_runner.runner.probing import build_probes, check_probes
from cu_runner.runtime import distributed
from cu_runner.runtime.progress import slow
from cu_runner.schema.settings import Speed, TrainSettings

logger = logging.getLogger(__name__)

Reader = Method[Any] | Regularizer | Probe  # what may work on the words of prompts


@dataclass(frozen=True)
class RunParts:
    """What a run is made of. regularizers: by name, in hook order. retention: None if it is off.
    probes: of recovery, by name.
    """

    model: DiffusionModel
    evaluator: Evaluator
    retention: Retention | None
    sequence: Sequence
    requests: list[Request]
    method: Method[Any]
    regularizers: dict[str, Regularizer]
    probes: dict[str, Probe] = field(default_factory=dict)


def build_parts(plan: RunConfig, device: str) -> RunParts:
    """Build every part of a run, what is quick first.

    Raises:
        ValueError: a part cannot be built, or parts do not go together: the evaluator does not know
            a concept, or the model does not read it in its prompts. OSError: a file is missing.
    """
    sequence = plan.sequence.build()
    requests = plan.requests(sequence)
    method = plan.method.build()
    method.check(sequence)
    regularizers = {name: node.build() for name, node in plan.regularizers.items()}
    check_pictured(plan.method_name, method, sequence)
    for folder in picture_folders(plan, sequence):
        read_whole(folder, 0)  # a damaged file is found now, not hours later at its request
    probes = build_probes(plan, sequence)
    names = (plan.method_name, "+".join(regularizers) or "none")
    logger.info("%s: %d requests, method %s, reg %s", sequence.name, len(requests), *names)
    if distributed.size() > 1:
        logger.info("%d processes", distributed.size())
    with slow("loading the model"):
        model = plan.model.build(device=device)
    prepare(model, plan.spine.speed, plan.spine.train)
    with slow("loading the evaluator"):
        evaluator = plan.evaluator.build(device=device)
    chosen = named(plan.method_name, method, regularizers)
    check_words(model, chosen)
    check_linear(model, method, chosen)
    check_words(model, {f"recovery={name}": probe for name, probe in probes.items()})
    check_labels(sequence, evaluator)
    check_prompts(model, sequence)
    check_probes(probes, model, sequence, plan.spine.eval)
    retention = plan.retention.build(device=device) if plan.retention else None
    return RunParts(model, evaluator, retention, sequence, requests, method, regularizers, probes)


def check_words(model: DiffusionModel, parts: Mapping[str, Reader]) -> None:
    """Raise ValueError for a part that works on the words of prompts, where the model has none.

    Args:
        parts: by what chooses them: "reg=gradproj".
    """
    if model.prompts.reads_words:
        return
    for name, part in parts.items():
        if part.reads_words:
            raise ValueError(
                f"{name} {part.reads_words}, and the model reads the names of classes, without "
                "words or a text encoder; choose one that compares predictions, such as method=rgd "
                "or reg=l2"
            )


def check_linear(
    model: DiffusionModel, method: Method[Any], parts: Mapping[str, Method[Any] | Regularizer]
) -> None:
    """Raise ValueError for a part that needs weights linear in the text, where others are trained.

    Args:
        method: whose weights are trained.
        parts: it and the regularizers, by what chooses them.
    """
    wanting = {name: part for name, part in parts.items() if part.linear}
    if not wanting:
        return
    trained = list(method.weights(model))
    linear = [name for name in trained if model.reads_linearly(name)]
    kind = type(model.denoiser).__name__
    for name, part in wanting.items():
        if not linear or (part.linear == "all" and len(linear) < len(trained)):
            raise ValueError(
                f"{name} {part.reads_words}, by weights that are linear in the text encoder's "
                f"output; of {kind} method.params={method.params} trains others; choose "
                "method.params=text_linear"
            )
        if part.one_text and len(model.prompts.parts) > 1:
            raise ValueError(
                f"{name} {part.reads_words}, and the text of {kind} names a concept once in the "
                "positions of each of its encoders; choose reg=gradproj or reg=nullspace"
            )


def named(
    method_name: str, method: Method[Any], regularizers: Mapping[str, Regularizer]
) -> dict[str, Method[Any] | Regularizer]:
    """Return a method and regularizers by what chooses them."""
    return {f"method={method_name}": method} | {
        f"reg={name}": each for name, each in regularizers.items()
    }


def prepare(model: DiffusionModel, speed: Speed, train: TrainSettings) -> None:
    """Make a loaded model as fast, and as small in memory, as the settings of a run say."""
    model.speed_up(speed)
    if train.gradient_checkpointing:
        model.checkpoint_gradients()
