"""Minimum-variance direction: a request changes keys and values along the one direction of the text
that hears its target and as little else as possible.

A cross-attention key or value is W t with t a text-encoder output [D] of one position of a prompt.
The change of a request is W <- W + a d^T: what it does to a text t' is a (d^T t'). d is the
minimum-variance distortionless filter (Capon, "High-resolution frequency-wavenumber spectrum
analysis", Proc. IEEE 57(8), 1969), with the target's own token in the place of the signal and
everything that is to be left alone in the place of the noise; a is trained by the method's loss.

Shapes: D text width, K names, P prompts of a name, L tokens, T targets of the request, out
attention width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from cu_runner.concepts.entries import spread
from cu_runner.concepts.templates import fill_caption
from cu_runner.methods.base import Batch, Method
from cu_runner.models.parameters import TEXT_WEIGHTS, gradients
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.minimum_variance import (
    RIDGES,
    Direction,
    KeptText,
    NameTexts,
    minimum_variance_direction,
    name_texts,
)
from cu_runner.request.name_sources import NameSource, earlier_targets, kept_names, normalized
from cu_runner.request.optimizer import make_optimizer
from cu_runner.request.scope import Scope
from cu_runner.request.text_subspace import check_contexts, in_context, nearest_names
from cu_runner.runtime.lazy import nn, torch, without_gradients

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SETTLED = 0.3  # of the step size, for the last steps


class MinVar(Regularizer):
    """Confine the request's change of every cross-attention key and value to a d^T, and train a.

    With Adam train.lr is the step of a in units of what the weight makes of the target's token
    (root mean square of W t), so that one step size serves every target and every layer. The
    optimiser of train.optimizer moves a alone, and the largest norm of train.grad_clip is that of
    its gradient. A method that sets the weights in closed form has its change S taken at the
    target: (S t) d^T.
    """

    reads_words = "changes keys and values in the direction of a name's tokens"
    linear = "all"
    one_text = True
    name = "minvar"  # in the configuration
    acts_on = ("step",)
    makes_step = True

    def __init__(
        self,
        ridge: PositiveFloat | None = None,
        context: NonNegativeFloat = 1.0,
        token: Literal["best", "first", "last", "all"] = "best",
        names: NameSource = NameSource(),
        contexts: tuple[str, ...] | None = None,
        prompts: PositiveInt = 24,
        settle: Annotated[float, Field(ge=0, le=1)] = 0.6,
    ) -> None:
        """
        Args:
            ridge: weight of |d|^2 against the text that is left alone, in units of |t|^2; it stands
                for names that nobody gave. None chooses it for every request: the one whose
                directions, each made without a fifth of the names, hear least of that fifth.
            context: weight of all other positions (begin, words around the name, end, padding,
                empty prompt) against the names.
            token: at which of the name's own tokens the target is heard. "best" is the one that can
                be told apart best from what is left alone: the largest t^T (C + lam I)^-1 t. "all"
                takes a direction at each of them.
            names: the names that are left alone besides the earlier targets. The target is never
                one of them.
            contexts: the prompts in which names and targets are encoded, with {concept} and
                {caption}; None is the sequence's target_prompt. {caption} runs through the
                sequence's captions.
            prompts: of each name, at most so many.
            settle: the step size is multiplied by 0.3 after this fraction of the steps.
        """
        if contexts is not None:
            check_contexts(contexts, f"reg.{self.name}.contexts")
        self.ridge, self.context, self.token, self.names = ridge, context, token, names
        self.contexts, self.prompts, self.settle = contexts, prompts, settle

    def check(self, method: Method[Batch]) -> None:
        """Refuse other weights than keys and values."""
        if method.params not in TEXT_WEIGHTS:
            raise ValueError(
                "reg=minvar changes keys and values along one direction of the text, and "
                f"method.params={method.params} trains other weights; choose "
                "method.params=text_linear"
            )

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Choose a direction for each target, and return what it hears of the rest."""
        targets = [concept.prompt_name for concept in scope.request.targets]
        chosen, record = self.choose(scope, targets)
        self._closed_form = method.closed_form
        self.begin_training(scope, scope.base, chosen)
        return record

    def choose(
        self, scope: Scope, targets: list[str], beside: Iterable[str] = ()
    ) -> tuple[list[Direction], dict[str, object]]:
        """Return a direction for each target, and what step.json holds of them.

        Args:
            targets: as prompts name them. beside: what is left alone besides the names.

        Raises:
            ValueError: there is no name to leave alone.
        """
        others = [*earlier_targets(scope), *beside]
        candidates = kept_names(scope, self.names)
        others += nearest_names(scope.model, candidates, targets, "{concept}", self.names.number)
        own_words = {normalized(name) for name in targets}
        others = [name for name in dict.fromkeys(others) if normalized(name) not in own_words]
        if not others:
            raise ValueError(
                f"reg.{self.name}.names: no name is left beside the target and the retained "
                "concepts; give more names"
            )
        kept = KeptText(scope.model.encode_empty().positions(), self.context)
        own = [name_texts(scope.model, self.placed(scope, name)) for name in targets]
        for texts in own:
            kept.add_target(texts)
        for name in others:
            kept.add(name_texts(scope.model, self.placed(scope, name)))
        together = sum((texts.own_squares for texts in own), torch.zeros_like(kept.C))
        chosen = [
            direction
            for name, texts in zip(targets, own, strict=True)
            for direction in self.directions(name, texts.own, kept, together - texts.own_squares)
        ]
        records = [
            kept.record(one) | self.more(one, kept, own[targets.index(one.target)])
            for one in chosen
        ]
        return chosen, {"kept_names": len(others), "targets": records}

    def more(self, chosen: Direction, kept: KeptText, own: NameTexts) -> dict[str, object]:
        """Return what else step.json holds of a target."""
        return {}

    def begin_training(
        self, scope: Scope, weights: Mapping[str, Tensor], chosen: list[Direction]
    ) -> None:
        """Begin with a change a of zero at the directions.

        Args:
            weights: W of every key and value by name; its a has the same name.
        """
        self._D = torch.stack([direction.d for direction in chosen]).float()  # [directions, D]
        self._T = torch.stack([direction.t for direction in chosen]).float()
        self._train, self._steps = scope.train, 0
        self._a = {
            name: weight.new_zeros(len(weight), len(chosen)) for name, weight in weights.items()
        }
        scales = [(weight @ self._T.T).square().mean().sqrt().item() for weight in weights.values()]
        self._optimizer = make_optimizer(list(self._a.values()), scope.train, scales)

    def placed(self, scope: Scope, name: str) -> list[tuple[str, str, str]]:
        """Return prompts of a name: each with the name, and with what comes before the name."""
        contexts = [
            fill_caption(context, caption)
            for context in self.contexts or scope.sequence.target_prompt
            for caption in (scope.sequence.captions if "{caption}" in context else [""])
        ]
        return [in_context(name, context) for context in spread(contexts, self.prompts)]

    def directions(self, name: str, own: Tensor, kept: KeptText, others: Tensor) -> list[Direction]:
        """Return the direction of a target at the token that is chosen, or that of each.

        Args:
            own: [n, D], its text. others: [D, D], the sum over the other targets of the request.
        """
        C = kept.C + others
        places = {"first": [0], "last": [len(own) - 1]}.get(self.token, range(len(own)))
        found = []
        for token in places:
            t = own[token]
            size = t.square().sum().item()
            ridge = self.ridge or min(RIDGES, key=lambda ridge: kept.leak(t, ridge * size))
            d = minimum_variance_direction(t, C, ridge * size)
            left = (d @ C @ d + ridge * size * d @ d).item()
            found.append((left, Direction(name, d, t, token, ridge)))
        if self.token == "best":
            return [min(found, key=lambda pair: pair[0])[1]]
        return [direction for _, direction in found]

    def on_gradients(self, params: dict[str, nn.Parameter]) -> None:
        """Turn the gradients G [out, D] into those of a, G d, and leave none for the optimiser."""
        for name, gradient in gradients(params).items():
            self._a[name].grad = gradient @ self._D.T  # W = W_start + a D
            params[name].grad = None

    @without_gradients
    def on_step(self, params: dict[str, nn.Parameter], before: dict[str, Tensor]) -> None:
        """Add a step of a; of a closed form, take its change at the targets."""
        if self._closed_form:
            for name, parameter in params.items():
                parameter.copy_(before[name] + (parameter - before[name]) @ self._T.T @ self._D)
            return
        last = {name: a.clone() for name, a in self._a.items()}
        self.step_of_a()
        for name, parameter in params.items():
            parameter.add_((self._a[name] - last[name]) @ self._D)

    def step_of_a(self) -> None:
        """Take the optimiser's step of a from its gradients, and forget these."""
        self._steps += 1
        if self._steps == round(self.settle * self._train.steps) + 1:
            for group in self._optimizer.param_groups:
                group["lr"] *= SETTLED
        if self._train.grad_clip:
            nn.utils.clip_grad_norm_(list(self._a.values()), self._train.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, object]:
        """Return a, the moments of its optimiser, and how many steps it has taken."""
        return {"a": self._a, "optimizer": self._optimizer.state_dict(), "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what state() gave."""
        for name, a in self._a.items():
            a.copy_(state["a"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._steps = state["steps"]
