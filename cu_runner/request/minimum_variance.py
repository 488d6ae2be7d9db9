"""The minimum-variance direction of a concept's own token, and the text that it must not hear.

d is the minimum-variance distortionless filter (Capon, "High-resolution frequency-wavenumber
spectrum analysis", Proc. IEEE 57(8), 1969), with the target's own token in the place of the signal
and everything that is to be left alone in the place of the noise.

Shapes: D text width, K names, P prompts of a name, L tokens, n tokens of a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

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

    own: [n, D], mean over prompts at its n tokens. each: [P, n, D], of every prompt. own_squares:
    [D, D], sum over the tokens of the mean of t t^T. around: [D, D], mean of t t^T over all other
    positions of its prompts.
    """

    own: Tensor
    each: Tensor
    own_squares: Tensor
    around: Tensor


def name_texts(model: DiffusionModel, placed: list[tuple[str, str, str]]) -> NameTexts:
    """Read the prompts of one name: P times (prompt, name, what comes before the name).

    Of a name that is longer than some prompt has room for, the tokens that every prompt has count.
    """
    (part,) = model.prompts.parts  # preflight refuses a text of several
    text = model.encode_prompts([prompt for prompt, *_ in placed])
    hidden = text.hidden.double()  # [P, L, D]
    spans = [part.span(name, prompt, before, partly=True) for prompt, name, before in placed]
    read = [len(text[row : row + 1].positions()) for row in range(len(text))]  # without masked ones
    tokens = min(span.stop - span.start for span in spans)
    own = torch.cat(
        [row[span][:tokens] for row, span in zip(hidden, spans, strict=True)]
    )  # [P * n, D]
    rest = torch.cat(
        [
            rows
            for row, span, length in zip(hidden, spans, read, strict=True)
            for rows in (row[: span.start], row[span.stop : length])
        ]
    )
    each = own.unflatten(0, (-1, tokens))
    return NameTexts(each.mean(0), each, own.T @ own / len(hidden), rest.T @ rest / len(rest))


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

    def unknown(self, t: Tensor, lam: float) -> Tensor:
        """Return d^T x at own tokens x of names that the direction was not told of.

        Each fifth of the names in turn, with all of their prompts.
        """
        heard = []
        for fold, square in enumerate(self.folds):
            if states := self.states[fold::FOLDS]:
                d = minimum_variance_direction(t, self.C - square, lam)
                heard += [state @ d for state in states]
        return torch.cat(heard)

    def leak(self, t: Tensor, lam: float) -> float:
        """Return the rms of what is heard of names that the direction was not told of."""
        return self.unknown(t, lam).square().mean().sqrt().item()

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
