"""What a probe of recovery provides, and what it may see."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Ordered
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import snapshot
from cu_runner.models.text import Text
from cu_runner.runtime.lazy import nn, torch
from cu_runner.runtime.seeding import derive_seed
from cu_runner.schema.settings import EvalSettings, Every

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True)
class ProbeImage:
    """One image that a probe asks for; prompt and seed fix its noise.

    concept: that it should show. cross: of the other domain, "" for none. variant, dose: of the
    probe. image: its number in that variant and dose; further attempts at it have the same. both:
    whether both domains must be recognised. untouched_steps: the untouched model takes so many of
    the first denoising steps. eta, noise_scale, scheduler: of the sampler; None is that of the
    evaluation. text: what the model reads in place of the prompt's words.
    """

    concept: str
    cross: str
    prompt: str
    seed: int
    image: int
    variant: str = ""
    dose: float = 0.0
    both: bool = False
    untouched_steps: int = 0
    eta: float = 0.0
    noise_scale: float = 1.0
    scheduler: str | None = None
    text: Text | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Number:
    """What a probe measures of a concept without an image."""

    concept: str
    value: float
    variant: str = ""
    dose: float = 0.0


@dataclass(frozen=True)
class Seen:
    """An image of a probe, and the evaluator's columns of it."""

    image: ProbeImage
    columns: Mapping[str, str | int | float]


@dataclass(frozen=True)
class Lab:
    """What probes see of a step: a model whose weights have unlearned some concepts.

    step: the request. unlearned: concepts, in their order. params: the weights that the run trains,
    as they are now; a probe that changes them does so inside changed(). base: their values in the
    untouched model. look: draws images with the weights as they are, and names what they show.
    latents: (prompts, number) -> [number, C, H, W], images of the untouched model, cached.
    predictions: rows of predictions.csv of a step up to this one. is_untouched: whether the weights
    are those of the untouched model. remember: (name of a thing, key, make) -> text, which is
    searched for once and cached.
    """

    model: DiffusionModel
    sequence: Sequence
    settings: EvalSettings
    step: int
    unlearned: tuple[Concept, ...]
    params: dict[str, nn.Parameter]
    base: dict[str, Tensor]
    look: Callable[[list[ProbeImage]], list[Seen]]
    latents: Callable[[list[str], int], Tensor]
    predictions: Callable[[int], pd.DataFrame]
    changed: Callable[[], AbstractContextManager[None]]
    remember: Callable[[str, dict[str, object], Callable[[], str]], str]
    is_untouched: bool

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Return fresh random numbers, the same at every step and in every run."""
        return torch.Generator().manual_seed(derive_seed("recovery", *purpose))


@dataclass(frozen=True)
class Cost:
    """What a probe makes for some concepts: images, and steps of training or search."""

    images: int = 0
    steps: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.images + other.images, self.steps + other.steps)


class Probe(ABC):
    """Tries to have unlearned concepts back.

    It is called for the unlearned concepts, and as controls for the same concepts with the
    untouched model and for retained concepts; it need not know which.

    Attributes:
        reads_words: what it does with the words of a prompt, as Method.reads_words.
        reads_earlier: whether it reads what was seen after every request before.
        asks_erased: whether it asks for the unlearned concepts, not for retained ones alone.
        steps_once: of a search for each concept that serves every request, and is cached.
    """

    reads_words: str = ""
    reads_earlier: bool = False
    asks_erased: bool = True
    steps_once: int = 0

    def __init__(self, every: Every = 1, controls: int = 4) -> None:
        """
        Args:
            every: after every so many requests and the last one, or after the last one alone.
            controls: so many of the retained concepts, evenly spread, are probed too.
        """
        self.every, self.controls = every, controls

    def check(self, sequence: Sequence) -> None:  # noqa: B027, most have nothing to check
        """Raise ValueError for what cannot be probed, before anything is loaded."""

    def check_model(  # noqa: B027, most have nothing to check
        self, model: DiffusionModel, sequence: Sequence, settings: EvalSettings
    ) -> None:
        """Raise ValueError for what cannot be probed with a model, before anything is trained."""

    def images(self, lab: Lab, concepts: list[Concept]) -> list[ProbeImage]:
        """Return the images that it draws with the weights as they are.

        Those of all probes are drawn together, and none is drawn twice.
        """
        return []

    def measure(self, lab: Lab, concepts: list[Concept]) -> list[Seen | Number]:
        """Return what was seen of the concepts: a row per image, or a number."""
        return [*lab.look(self.images(lab, concepts))]

    @abstractmethod
    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return what measure() makes of so many concepts at once, without steps_once."""

    def on_retained(self, sequence: Sequence) -> list[Concept]:
        """Return the retained concepts that are probed as a control."""
        kept = list(sequence.retain)
        count = min(self.controls, len(kept))
        return [kept[i * len(kept) // count] for i in range(count)]

    def on_erased(self, lab: Lab) -> list[Concept]:
        """Return the unlearned concepts that are probed: all, or none."""
        return list(lab.unlearned) if self.asks_erased else []

    def has_untouched(self) -> bool:
        """Tell whether the untouched model is a control."""
        return True

    def is_due(self, step: int, last: int) -> bool:
        """Tell whether it measures after a request; after the last it always does."""
        return step == last or (self.every != "last" and step > 0 and step % self.every == 0)


def cost_of(
    probes: dict[str, Probe], erased: list[list[Concept]], sequence: Sequence, done: int = 0
) -> Cost:
    """Return what the probes make at most: none of the controls is in the cache.

    Args:
        erased: what is unlearned after each request of the run.
        done: so many requests are finished.
    """
    total = Cost()
    for probe, facing in itertools.product(probes.values(), sequence.by_domain):
        due = [
            names
            for step, concepts in enumerate(erased, start=1)
            if step > done and probe.is_due(step, len(erased))
            if (names := [each.name for each in concepts if each.domain == facing.domain])
        ]
        kept = len(probe.on_retained(facing))
        numbers = [number for names in due for number in (len(names) * probe.asks_erased, kept)]
        asked = (len(set().union(*due)) * probe.asks_erased + kept) if due else 0
        if probe.has_untouched():  # a concept at a time
            numbers += [1] * asked
        for number in filter(None, numbers):
            total += probe.cost(facing, number)
        total += Cost(steps=probe.steps_once * asked)
    return total


def require_distinct(key: str, entries: Ordered[object]) -> None:
    """Raise ValueError for an empty list of a setting, and for an entry that it has twice."""
    if not entries:
        raise ValueError(f"{key}: is empty; give at least one entry")
    if twice := [entry for place, entry in enumerate(entries) if entry in entries[:place]]:
        raise ValueError(f"{key}: has {twice[0]!r} twice; give each once")


def evaluation_images(
    sequence: Sequence, concepts: list[Concept], number: int, **more: object
) -> list[ProbeImage]:
    """Return `number` of the evaluation's own images of each concept, evenly spread.

    more: what else a ProbeImage has.
    """
    found = []
    for concept in concepts:
        own = sequence.evaluation_images([concept])
        count = min(number, len(own))
        chosen = [own[i * len(own) // count] for i in range(count)]
        found += [
            ProbeImage(each.concept, each.cross, each.prompt, each.seed, place, **more)  # type: ignore[arg-type]
            for place, each in enumerate(chosen)
        ]
    return found


def crosses_of(sequence: Sequence, number: int) -> Iterator[str]:
    """Yield `number` names of the other domain, evenly spread; "" where there is none."""
    names = [concept.name for concept in sequence.cross_retain]
    for i in range(number):
        yield names[i * len(names) // number % len(names)] if names else ""


@contextmanager
def restored(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Put weights back to what they were, whatever is done to them inside."""
    before = snapshot(parameters)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)
