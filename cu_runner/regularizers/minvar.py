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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from cu_runner.concepts.templates import fill_caption
from cu_runner.methods.base import Batch, Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import TEXT_WEIGHTS, gradients
from cu_runner.regularizers.base import Regularizer
from cu_runner.request.images import spread
from cu_runner.request.name_sources import NameSource, earlier_targets, kept_names
from cu_runner.request.optimizer import make_optimizer
from cu_runner.request.scope import Scope
from cu_runner.request.text_subspace import check_contexts, in_context, nearest_names
from cu_runner.runtime.lazy import nn, torch, without_gradients

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SETTLED = 0.3  # of the step size, for the last steps
FOLDS = 5  # of the kept names, where they choose the ridge
RIDGES = tuple(10.0**power for power in (-3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))


def minimum_variance_direction(t: Tensor, C: Tensor, lam: float) -> Tensor:
    """Return d = argmin d^T C d + lam |d|^2 subject to d^T t = 1, [D]   (Capon 1969, eq. 15).

        d = (C + lam I)^-1 t / (t^T (C + lam I)^-1 t)

    Computed in float64, returned in t's dtype.

    Args:
        t: [D], the text that d must hear.
        C: [D, D], symmetric, positive semi-definite: sum of x x^T over the text to be left alone.
        lam: weight of |d|^2, 0 or more.

    Raises:
        ValueError: t is zero, or C + lam I has no inverse.
    """
    if not t.any():
        raise ValueError("minimum_variance_direction: t is zero, and no d has d^T t = 1")
    regular = C.double() + lam * torch.eye(len(t), dtype=torch.float64, device=t.device)
    try:
        solved = torch.linalg.solve(regular, t.double())
    except RuntimeError:
        raise ValueError(
            f"minimum_variance_direction: C + lam I has no inverse with lam={lam}; give a lam "
            "above 0"
        ) from None
    return (solved / (solved @ t.double())).to(t.dtype)


@dataclass(frozen=True)
class NameTexts:
    """What the prompts of one name say at each of the name's own tokens, and elsewhere.

    own: [n, D], mean over prompts at its n tokens. own_squares: [D, D], sum over the tokens of the
    mean of t t^T. around: [D, D], mean of t t^T over all other positions of its prompts.
    """

    own: Tensor
    own_squares: Tensor
    around: Tensor


def name_texts(model: DiffusionModel, placed: list[tuple[str, str, str]]) -> NameTexts:
    """Read the prompts of one name: P times (prompt, name, what comes before the name).

    Of a name that is longer than some prompt has room for, the tokens that every prompt has count.
    """
    hidden = model.encode_prompts([prompt for prompt, *_ in placed]).hidden.double()  # [P, L, D]
    spans = [model.token_span(name, prompt, before, partly=True) for prompt, name, before in placed]
    tokens = min(span.stop - span.start for span in spans)
    own = torch.cat(
        [row[span][:tokens] for row, span in zip(hidden, spans, strict=True)]
    )  # [P * n, D]
    rest = torch.cat(
        [
            part
            for row, span in zip(hidden, spans, strict=True)
            for part in (row[: span.start], row[span.stop :])
        ]
    )
    return NameTexts(
        own.unflatten(0, (-1, tokens)).mean(0), own.T @ own / len(hidden), rest.T @ rest / len(rest)
    )


@dataclass(frozen=True)
class Direction:
    """What was chosen for one target. token: which of its own tokens, counted from 0."""

    target: str
    d: Tensor  # [D], d^T t = 1
    t: Tensor  # [D], what the text is at that token, mean over prompts
    token: int
    ridge: float  # in units of |t|^2


class KeptText:
    """The text that a direction must not hear: the sum C of x x^T over it, and each fold's share.

    A name adds E[x x^T] at each of its own tokens, and the mean over all other positions of its
    prompts and over those of the empty prompt. A target adds the latter two alone.
    """

    def __init__(self, empty: Tensor, context: float) -> None:
        """Begin with nothing. empty: [L, D], the text of the empty prompt. context: weight of all
        that is not a name.
        """
        self._empty = empty.double().T @ empty.double() / len(empty)
        self._context = context
        self.C = torch.zeros_like(self._empty)
        self.elsewhere = torch.zeros_like(self._empty)  # sum over names, of what is not a name
        self.folds = [torch.zeros_like(self._empty) for _ in range(FOLDS)]
        self.states: list[Tensor] = []  # [n, D] of each name
        self.number = 0  # of names and targets

    def add_target(self, texts: NameTexts) -> None:
        """Leave what surrounds a target alone."""
        self.number += 1
        self.elsewhere += texts.around + self._empty
        self.C += self._context * (texts.around + self._empty)

    def add(self, texts: NameTexts) -> None:
        """Leave a name alone, and what surrounds it."""
        square = texts.own_squares + self._context * (texts.around + self._empty)
        self.number += 1
        self.elsewhere += texts.around + self._empty
        self.C += square
        self.folds[len(self.states) % FOLDS] += square
        self.states.append(texts.own)

    def leak(self, t: Tensor, lam: float) -> float:
        """Return the rms of d^T x over own tokens x of names that the direction was not told of.

        Each fifth of the names in turn, with all of their prompts.
        """
        heard = []
        for fold, square in enumerate(self.folds):
            if states := self.states[fold::FOLDS]:
                d = minimum_variance_direction(t, self.C - square, lam)
                heard += [state @ d for state in states]
        return torch.cat(heard).square().mean().sqrt().item()

    def record(self, chosen: Direction) -> dict[str, object]:
        """Return what step.json holds of a target, whose d^T t is 1.

        heard_of_names, heard_elsewhere: rms of d^T x over own tokens of the names, and over all
        other positions. heard_of_unknown_names: the same of names that were left out in turn.
        target_against_kept: (d^T t)^2 against what it hears of all that is left alone, d^T C d, for
        each name.
        """
        d, lam = chosen.d, chosen.ridge * chosen.t.square().sum().item()
        return {
            "target": chosen.target,
            "token": chosen.token,
            "ridge": chosen.ridge,
            "heard_of_names": (torch.cat(self.states) @ d).square().mean().sqrt().item(),
            "heard_of_unknown_names": self.leak(chosen.t, lam),
            # each name's mean over its positions and that over the empty prompt's
            "heard_elsewhere": (d @ self.elsewhere @ d / (2 * self.number)).sqrt().item(),
            "target_against_kept": self.number / (d @ self.C @ d).item(),
        }


class MinVar(Regularizer):
    """Confine the request's change of every cross-attention key and value to a d^T, and train a.

    With Adam train.lr is the step of a in units of what the weight makes of the target's token
    (root mean square of W t), so that one step size serves every target and every layer. The
    optimiser of train.optimizer moves a alone, and the largest norm of train.grad_clip is that of
    its gradient. A method that sets the weights in closed form has its change S taken at the
    target: (S t) d^T.
    """

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
            check_contexts(contexts, "reg.minvar.contexts")
        self.ridge, self.context, self.token, self.names = ridge, context, token, names
        self.contexts, self.prompts, self.settle = contexts, prompts, settle

    def check(self, method: Method[Batch]) -> None:
        """Refuse other weights than keys and values."""
        if method.params not in TEXT_WEIGHTS:
            raise ValueError(
                "reg=minvar changes keys and values along one direction of the text, and "
                f"method.params={method.params} trains other weights; choose method.params=kv_xattn"
            )

    def begin_request(self, scope: Scope, method: Method[Batch]) -> dict[str, object]:
        """Choose a direction for each target, and return what it hears of the rest."""
        targets = [concept.prompt_name for concept in scope.request.targets]
        others = earlier_targets(scope)
        candidates = kept_names(scope, self.names)
        others += nearest_names(scope.model, candidates, targets, "{concept}", self.names.number)
        if not others:
            raise ValueError(
                "reg.minvar.names: no name is left beside the target and the retained concepts; "
                "give more names"
            )
        kept = KeptText(scope.model.encode_empty().hidden[0], self.context)
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
        self._D = torch.stack([direction.d for direction in chosen]).float()  # [directions, D]
        self._T = torch.stack([direction.t for direction in chosen]).float()
        self._closed_form, self._train, self._steps = method.closed_form, scope.train, 0
        heard = {
            name: (weight @ self._T.T).square().mean().sqrt().item()
            for name, weight in scope.base.items()
        }
        self._a = {
            name: weight.new_zeros(len(weight), len(chosen)) for name, weight in scope.base.items()
        }
        self._optimizer = make_optimizer(
            list(self._a.values()), scope.train, [heard[name] for name in self._a]
        )
        return {"kept_names": len(others), "targets": [kept.record(one) for one in chosen]}

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
        self._steps += 1
        if self._steps == round(self.settle * self._train.steps) + 1:
            for group in self._optimizer.param_groups:
                group["lr"] *= SETTLED
        if self._train.grad_clip:
            nn.utils.clip_grad_norm_(list(self._a.values()), self._train.grad_clip)
        last = {name: a.clone() for name, a in self._a.items()}
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, parameter in params.items():
            parameter.add_((self._a[name] - last[name]) @ self._D)

    def state(self) -> dict[str, object]:
        """Return a, the moments of its optimiser, and how many steps it has taken."""
        return {"a": self._a, "optimizer": self._optimizer.state_dict(), "steps": self._steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Take what state() gave."""
        for name, a in self._a.items():
            a.copy_(state["a"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._steps = state["steps"]
