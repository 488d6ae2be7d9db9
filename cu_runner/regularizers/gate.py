"""Gates: a request adds to keys and values only where the text says its target's own token.

minvar changes a key or value by a (d^T x), for every text x. What d hears of a name that nobody
gave is little, but it adds up over the requests. Here the same change is made where d^T x is above
a threshold, and nowhere else, which no linear change can do (compare the gated adapters of CPE, Lee
et al. 2025, arXiv 2506.22806, and of GLoCE, Lee et al. 2025, arXiv 2503.12356). Keys and values of
every other text are those of the untouched model to the last bit, and no request touches the gate
of another. Where the method unlearns a target by other words too (method.also_called), each of them
has a gate of its own.

Shapes: D text width, N gates, T targets of the request, out attention width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from cu_runner.concepts.entries import comparable
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.methods.base import Batch, Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import gradients
from cu_runner.regularizers.minvar import MinVar
from cu_runner.request.minimum_variance import Direction, KeptText, NameTexts
from cu_runner.request.name_sources import NameSource, earlier_targets, kept_names
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import nn, without_gradients

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class Gate(MinVar):
    """Put a gate for every target before keys and values, and train what they add where it is open.

    Directions, step size and options are those of minvar. A gate opens where d^T x is above the
    threshold; d^T t is 1 at the mean t of the target's own token over prompts.
    """

    name = "gate"
    has_weights = True

    def __init__(
        self,
        threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5,
        ridge: PositiveFloat | None = None,
        context: NonNegativeFloat = 1.0,
        token: Literal["best", "first", "last"] = "best",
        names: NameSource = NameSource(),
        contexts: tuple[str, ...] | None = None,
        prompts: PositiveInt = 24,
        settle: Annotated[float, Field(ge=0, le=1)] = 0.6,
    ) -> None:
        """
        Args:
            threshold: a gate opens where it hears more than this.
            ridge, context, token, names, contexts, prompts, settle: as for minvar.
        """
        super().__init__(ridge, context, token, names, contexts, prompts, settle)
        self.threshold = threshold

    def check(self, method: Method[Batch]) -> None:
        """Refuse methods that do not train, or other weights than keys and values together."""
        if method.params not in ("kv_xattn", "text_linear"):
            raise ValueError(
                "reg=gate puts gates before keys and values, and "
                f"method.params={method.params} trains other weights; choose "
                "method.params=text_linear"
            )
        if method.ascends:
            raise ValueError(
                "reg=gate leaves the retained images as they are, and the ascent of "
                "method=forward_kl is measured by their gradient; choose method.ascent_stop=null "
                "with a method.cap of 1 at most"
            )
        if method.closed_form:
            raise ValueError(
                "reg=gate trains what keys and values add where a gate is open, and the method "
                "sets the weights themselves; choose a method that trains, or reg=minvar"
            )

    def own_weights(
        self, model: DiffusionModel, sequence: Sequence, method: Method[Batch]
    ) -> dict[str, nn.Parameter]:
        """Return the gates: for each target of the sequence one, and one for each of its other
        words.
        """
        from cu_runner.models.gates import add_gates

        return add_gates(model.denoiser, len(words_of(sequence.targets, method)))

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Set the directions of the request's gates, and return what they hear of the rest."""
        from cu_runner.models.gates import OPEN, VALUES

        own = words_of(scope.request.targets, method)
        every = words_of(scope.sequence.targets, method)
        self._gates = [every.index(word) for word in own]
        chosen, record = self.choose(
            scope, [words for _, words in own], self.other_words(scope, method)
        )
        # a gate opens at OPEN: with s d for d it opens where d^T x > threshold
        self._scale = OPEN / self.threshold
        weights = dict(scope.model.denoiser.named_parameters())
        self._values = [name for name in scope.params if name.endswith(VALUES)]
        layers = {
            name: weights[name.removesuffix(VALUES) + "weight"].detach().float()
            for name in self._values
        }
        self.begin_training(scope, layers, chosen)
        self._start = {name: scope.start[name][:, self._gates] for name in self._values}
        self.set_directions(scope.params)
        return record

    def other_words(self, scope: Scope, method: Method[Batch]) -> list[str]:
        """Return the other words of earlier targets and of the names that are left alone.

        Those of a retained concept are never among them, unless its name may be.
        """
        left_alone = {*earlier_targets(scope), *kept_names(scope, self.names)}
        sequence = scope.sequence
        prompts = {comparable(name): sequence.prompt_name(name) for name in sequence.prompt_names}
        heard = {comparable(name) for name in left_alone}
        return [
            words
            for concept, known in method.other_words.items()
            if comparable(prompts.get(concept, concept)) in heard
            for words in known
        ]

    @without_gradients
    def set_directions(self, params: dict[str, nn.Parameter]) -> None:
        """Let the request's gates hear their targets. They add what they added before."""
        (directions,) = (weight for name, weight in params.items() if name not in self._values)
        directions[self._gates] = self._scale * self._D

    def more(self, chosen: Direction, kept: KeptText, own: NameTexts) -> dict[str, object]:
        """Return the least that is heard of the target in a prompt, and the most of other names.

        most_of_unknown_names: of names that were left out in turn; no gate was told of them.
        """
        size = chosen.ridge * chosen.t.square().sum().item()
        least = (own.each[:, chosen.token] @ chosen.d).min().item()
        if least <= self.threshold:
            logger.warning(
                "reg.gate.threshold=%g: the gate of %s stays shut in some of its prompts, where it "
                "hears %.2f; lower it",
                self.threshold,
                chosen.target,
                least,
            )
        return {
            "threshold": self.threshold,
            "least_of_target": least,
            "most_of_unknown_names": kept.unknown(chosen.t, size).max().item(),
        }

    def on_gradients(self, params: dict[str, nn.Parameter]) -> None:
        """Turn the gradients of the request's values into those of a; leave none."""
        for name, gradient in gradients(params).items():
            if name in self._a:
                self._a[name].grad = gradient[:, self._gates] / self._scale
            params[name].grad = None

    @without_gradients
    def on_step(self, params: dict[str, nn.Parameter], before: dict[str, Tensor]) -> None:
        """Take a step of a, and set the values of the request's gates: a for what is heard as 1."""
        self.step_of_a()
        for name, a in self._a.items():
            params[name][:, self._gates] = self._start[name] + a / self._scale


def words_of(concepts: Iterable[Concept], method: Method[Batch]) -> list[tuple[str, str]]:
    """Return (concept, words) of each gate, once: its name in prompts, then its other words."""
    return [
        (concept.name, words)
        for concept in concepts
        for words in dict.fromkeys([concept.prompt_name, *method.words_for(concept)])
    ]
