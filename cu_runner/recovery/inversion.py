"""Textual inversion: one token is searched that makes the unlearned model draw the concept (Gal et
al. 2022, arXiv 2208.01618; as an attack: Pham et al. 2023, arXiv 2308.01508).

Images of the concept are made by the untouched model; the weights stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.recovery._finetune import (
    batch_loss,
    first_token,
    free_word,
    own_prompts,
    spread_over,
)
from cu_runner.recovery.base import Cost, Lab, Number, Probe, Seen, evaluation_images
from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import torch
from cu_runner.schema.settings import EvalSettings, Every, StepSize

if TYPE_CHECKING:
    from torch import Tensor


class Inversion(Probe):
    """Puts a searched token in the place of the concept's name."""

    reads_words = "trains the embedding of a word"

    def __init__(
        self,
        lr: StepSize,
        *,
        steps: PositiveInt = 200,
        batch_size: PositiveInt = 4,
        examples: PositiveInt = 8,
        images: PositiveInt = 4,
        every: Every = "last",
        controls: PositiveInt = 2,
    ) -> None:
        """
        Args:
            lr: step size of AdamW on the token's embedding, for one image: batch_size times that
                is taken, as published.
            steps: of the search. batch_size: images of a step. examples: distinct images.
            images: of a concept. every, controls: as for Probe.
        """
        super().__init__(every, controls)
        self._lr, self._steps, self._batch_size = lr, steps, batch_size
        self._examples, self._number = examples, images

    def check(self, sequence: Sequence) -> None:
        """Raise ValueError where prompts do not name a concept: there is no place for a token."""
        for concept in (*sequence.targets, *self.on_retained(sequence)):
            own_prompts(sequence, concept)
            for image in evaluation_images(sequence, [concept], self._number):
                if image.prompt.count(concept.name) != 1:
                    raise ValueError(
                        f"recovery.inversion: the evaluation prompt {image.prompt!r} does not hold "
                        f"the name {concept.name!r} once, and a searched token takes its place; "
                        "leave inversion out"
                    )

    def check_model(
        self, model: DiffusionModel, sequence: Sequence, settings: EvalSettings
    ) -> None:
        """Raise ModelError without a token that is free for a search."""
        for concept in (*sequence.targets, *self.on_retained(sequence)):
            free_word(model, own_prompts(sequence, concept))

    def measure(self, lab: Lab, concepts: list[Concept]) -> list[Seen | Number]:
        """Return what is seen in images of the token that was found for each concept."""
        found: list[Seen | Number] = []
        for concept in concepts:
            word = free_word(lab.model, own_prompts(lab.sequence, concept))
            vectors = self._search(lab, concept, word)
            wanted = evaluation_images(lab.sequence, [concept], self._number)
            prompts = [image.prompt.replace(concept.name, word, 1) for image in wanted]
            with torch.no_grad():
                text = lab.model.prompts.encode_replaced(prompts, word, vectors)
            rows = [text[i : i + 1] for i in range(len(wanted))]
            found += lab.look(
                [replace(image, text=row) for image, row in zip(wanted, rows, strict=True)]
            )
        return found

    def _search(self, lab: Lab, concept: Concept, word: str) -> list[Tensor]:
        """Return the embedding that was found, [1, width] of each text encoder."""
        model = lab.model
        chosen = spread_over(own_prompts(lab.sequence, concept), self._examples)
        latents = lab.latents(chosen, self._examples)
        prompts = [prompt.replace(concept.prompt_name, word, 1) for prompt in chosen]
        generator = lab.generator("inversion", concept.name)
        vectors = [
            table[first_token(tokenizer, word)][None].clone().requires_grad_(True)
            for tokenizer, table in zip(
                model.prompts.tokenizers, model.prompts.embeddings(), strict=True
            )
        ]
        optimizer = torch.optim.AdamW(vectors, lr=self._lr * self._batch_size)
        for _ in range(self._steps):
            with torch.enable_grad(), distributed.alone():
                text = model.prompts.encode_replaced(prompts, word, vectors)
                batch_loss(model, latents, text, self._batch_size, generator).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [vector.detach() for vector in vectors]

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return the images of so many concepts, and the steps of their searches."""
        return Cost(self._number * concepts, self._steps * concepts)
