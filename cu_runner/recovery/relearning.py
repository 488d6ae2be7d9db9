"""Fine-tuning for a few steps: how fast does the concept come back? (Suriyakumar et al. 2024, arXiv
2410.08074; Fan et al. 2025, arXiv 2502.05374)

On the concept's own images that is relearning; on unrelated images it shows what was only covered.
All images are made by the untouched model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.parameters import is_gate
from cu_runner.recovery._finetune import batch_loss, own_prompts, spread_over, unrelated_prompts
from cu_runner.recovery.base import (
    Cost,
    Lab,
    Number,
    Probe,
    ProbeImage,
    Seen,
    evaluation_images,
    require_distinct,
    restored,
)
from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import nn, torch
from cu_runner.schema.settings import Every, StepSize

Data = Literal["own", "unrelated"]


class Relearning(Probe):
    """Trains the weights that the run trains; with gates, the keys and values behind them.

    variant: on which images; dose: after how many steps.
    """

    def __init__(
        self,
        steps: list[NonNegativeInt],
        lr: StepSize,
        *,
        data: list[Data],
        batch_size: PositiveInt = 4,
        examples: PositiveInt = 8,
        images: PositiveInt = 4,
        every: Every = "last",
        controls: PositiveInt = 2,
    ) -> None:
        """
        Args:
            steps: after how many an image is looked at; 0 is the model as it is.
            lr: step size of AdamW, without decay.
            data: "own", the concept's own images; "unrelated", images of its anchor's prompts.
            batch_size: images of a step. examples: distinct images that it trains on.
            images: of the evaluation, of a concept, after each number of steps.
            every, controls: as for Probe.

        Raises:
            ValueError: no step or no data, or one twice.
        """
        super().__init__(every, controls)
        require_distinct("recovery.relearning.steps", steps)
        require_distinct("recovery.relearning.data", data)
        self._steps, self._lr, self._data = sorted(steps), lr, data
        self._batch_size, self._examples, self._number = batch_size, examples, images

    def check(self, sequence: Sequence) -> None:
        """Raise ValueError for a concept of which no training prompt has the name once."""
        if "own" in self._data:
            for concept in (*sequence.targets, *self.on_retained(sequence)):
                own_prompts(sequence, concept)

    def measure(self, lab: Lab, concepts: list[Concept]) -> list[Seen | Number]:
        """Return what is seen after each number of steps; every training from the same weights.

        Concepts whose unrelated images are the same are looked at in one training.
        """
        found: list[Seen | Number] = []
        for kind in self._data:
            for chosen, group in self._by_prompts(lab.sequence, concepts, kind):
                if self._steps[0] == 0:  # before any step: what the evaluation has drawn
                    found += lab.look(self._images(lab, group, kind, 0))
                with lab.changed():
                    found += self._train(lab, chosen, group, kind)
        return found

    def _by_prompts(
        self, sequence: Sequence, concepts: list[Concept], kind: Data
    ) -> list[tuple[list[str], list[Concept]]]:
        """Return the prompts of each training, and the concepts that are looked at in it."""
        find = {"own": own_prompts, "unrelated": unrelated_prompts}[kind]
        groups: dict[tuple[str, ...], list[Concept]] = {}
        for concept in concepts:
            chosen = spread_over(find(sequence, concept), self._examples)
            groups.setdefault(tuple(chosen), []).append(concept)
        return [(list(chosen), group) for chosen, group in groups.items()]

    def _train(
        self, lab: Lab, chosen: list[str], concepts: list[Concept], kind: Data
    ) -> list[Seen | Number]:
        latents, text = lab.latents(chosen, self._examples), lab.model.encode_prompts(chosen)
        # not of the concepts' names: what one concept shows rests on no other that is looked at
        generator = lab.generator("relearning", kind, *chosen)
        found: list[Seen | Number] = []
        with trainable(lab) as params:
            optimizer = torch.optim.AdamW(params, lr=self._lr, weight_decay=0.0)
            for done in range(self._steps[-1] + 1):
                if done and done in self._steps:
                    with lab.changed():  # these weights alone
                        found += lab.look(self._images(lab, concepts, kind, done))
                if done < self._steps[-1]:
                    with torch.enable_grad(), distributed.alone():
                        loss = batch_loss(lab.model, latents, text, self._batch_size, generator)
                        loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return found

    def _images(self, lab: Lab, concepts: list[Concept], kind: Data, done: int) -> list[ProbeImage]:
        """Return evaluation images of concepts, to be drawn after some steps."""
        return evaluation_images(
            lab.sequence, concepts, self._number, variant=kind, dose=float(done)
        )

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return the images and the training steps of so many concepts."""
        looked = self._number * len(self._steps) * len(self._data) * concepts
        trainings = concepts * self._data.count("own")
        if "unrelated" in self._data:
            groups = self._by_prompts(sequence, list(sequence.targets), "unrelated")
            trainings += min(concepts, len(groups))
        return Cost(looked, self._steps[-1] * trainings)


@contextmanager
def trainable(lab: Lab) -> Iterator[list[nn.Parameter]]:
    """Give the weights to train, with gradients, in fp32; they are put back afterwards."""
    own = lab.params
    if all(map(is_gate, own)):  # a fine-tuning knows nothing of gates
        weights = lab.model.denoiser.named_parameters()
        own = {name: weight for name, weight in weights if lab.model.reads_linearly(name)}
    dtypes = [weight.dtype for weight in own.values()]
    with restored(own):
        for weight in own.values():
            weight.data = weight.data.float()
            weight.requires_grad_(True)
        try:
            yield list(own.values())
        finally:
            for weight, dtype in zip(own.values(), dtypes, strict=True):
                weight.requires_grad_(False)
                weight.data = weight.data.to(dtype)
