"""How much of a concept some other text embedding can still reach: a closed form, no image.

With the equations of RECE (Gong et al. 2024, arXiv 2407.12383, eq. 8-10): c is the concept's text,
W0 and W1 the keys and values of the untouched and of the unlearned model. The embedding that comes
nearest to the concept's old keys and values is c* = G c with
G = (r I + sum_l W1_l^T W1_l)^-1 sum_l W1_l^T W0_l.

Shapes: D text width, K concepts.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import TYPE_CHECKING

from pydantic import PositiveFloat, PositiveInt

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.parameters import is_gate
from cu_runner.recovery.base import Cost, Lab, Number, Probe, Seen
from cu_runner.request.text_subspace import concept_vectors
from cu_runner.runtime.lazy import torch, without_gradients
from cu_runner.schema.settings import Every

if TYPE_CHECKING:
    from torch import Tensor


class Residual(Probe):
    """Reports 100 (1 - residual): percent of the energy of keys and values that is in reach."""

    def __init__(
        self,
        *,
        ridge: PositiveFloat = 1e-4,
        context: str = "{concept}",
        every: Every = 1,
        controls: PositiveInt = 4,
    ) -> None:
        """
        Args:
            ridge: r, in units of the mean of the diagonal of sum_l W1_l^T W1_l.
            context: the prompt in which a concept's text is read, at the name's own tokens.
            every, controls: as for Probe.
        """
        super().__init__(every, controls)
        self._ridge, self._context = ridge, context

    def measure(self, lab: Lab, concepts: list[Concept]) -> list[Seen | Number]:
        """Return what is in reach of each concept; nothing with gates, which move no weight."""
        if all(map(is_gate, lab.params)):
            return []
        names = [concept.prompt_name for concept in concepts]
        texts = concept_vectors(lab.model, names, self._context).to(lab.model.device)
        weights = dict(lab.model.denoiser.named_parameters())
        text_weights = [name for name in weights if lab.model.reads_linearly(name)]
        now = [weights[name].detach() for name in text_weights]
        base = [
            (lab.base[name] if name in lab.base else weights[name]).detach()
            for name in text_weights
        ]
        # the mean over the parts of a text
        parts = residual(base, now, texts, self._ridge).view(-1, len(concepts))
        left = parts.mean(0) if len(parts) > 1 else parts[0]
        return [
            Number(concept.name, 100 * (1 - value))
            for concept, value in zip(concepts, left.tolist(), strict=True)
        ]

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return nothing: no image is made."""
        return Cost()


@without_gradients
def residual(base: Ordered[Tensor], now: Ordered[Tensor], texts: Tensor, ridge: float) -> Tensor:
    """Return ||W1 G c - W0 c||^2 / ||W0 c||^2 of each concept [K], over all weights together.

    Args:
        base, now: weights [out, D] of the untouched and of the unlearned model, in one order.
        texts: c of each concept, [D, K].
        ridge: r, in units of the mean of the diagonal of sum_l W1_l^T W1_l.
    """
    first, second = torch.cat(list(base)).double(), torch.cat(list(now)).double()
    c = texts.double()
    gram = second.T @ second
    scale = ridge * gram.diagonal().mean()
    reached = torch.linalg.solve(
        gram + scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device),
        second.T @ (first @ c),
    )
    wanted = first @ c
    return (second @ reached - wanted).square().sum(0) / wanted.square().sum(0)
