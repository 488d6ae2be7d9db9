"""UnlearnDiffAtk: a few tokens before the prompt are searched with the unlearned model's own loss
(Zhang et al. 2024, arXiv 2310.11868).

They minimise the diffusion loss of an image of the concept, by AdamW on their embeddings; each step
takes the loss at the nearest tokens, and those of the lowest loss are kept. The published search
relaxes the choice of tokens in another way and draws images, timesteps and noise anew at each step;
here all steps have the same draw, so that their losses can be compared. Its numbers of tokens,
steps, step size and decay are the defaults here.

Shapes: K tokens, V vocabulary, D width of embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, PositiveInt

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.recovery._finetune import batch_loss, free_word, own_prompts, spread_over
from cu_runner.recovery.adversarial import plain_tokens, words_of
from cu_runner.recovery.base import Cost, Lab, Number, Probe, ProbeImage, Seen, evaluation_images
from cu_runner.runtime import distributed
from cu_runner.runtime.lazy import torch
from cu_runner.schema.errors import ModelError
from cu_runner.schema.settings import EvalSettings, Every, StepSize

if TYPE_CHECKING:
    from torch import Tensor


class UnlearnDiffAtk(Probe):
    """Draws the evaluation's prompts behind the tokens that were found for each concept."""

    reads_words = "searches for tokens before a prompt"

    def __init__(
        self,
        *,
        tokens: PositiveInt = 3,
        steps: PositiveInt = 40,
        lr: StepSize = 0.01,
        weight_decay: NonNegativeFloat = 0.1,
        batch_size: PositiveInt = 4,
        examples: PositiveInt = 4,
        images: PositiveInt = 4,
        every: Every = "last",
        controls: PositiveInt = 2,
    ) -> None:
        """
        Args:
            tokens: K; published: 5 for styles, 3 for objects.
            steps, lr, weight_decay: of AdamW. batch_size: images of a step.
            examples: distinct images.
            images: of a concept. every, controls: as for Probe.
        """
        super().__init__(every, controls)
        self._tokens, self._steps, self._lr, self._decay = tokens, steps, lr, weight_decay
        self._batch_size, self._examples, self._number = batch_size, examples, images

    def check(self, sequence: Sequence) -> None:
        """Raise ValueError for a concept of which no training prompt has the name once."""
        for concept in (*sequence.targets, *self.on_retained(sequence)):
            own_prompts(sequence, concept)

    def check_model(
        self, model: DiffusionModel, sequence: Sequence, settings: EvalSettings
    ) -> None:
        """Raise ModelError for two text encoders, or without a token that is free for a search."""
        if len(model.text_encoders) > 1:
            raise ModelError(
                "recovery.unlearndiffatk: searches the tokens of one text encoder, and this model "
                f"has {len(model.text_encoders)}; leave it out"
            )
        for concept in (*sequence.targets, *self.on_retained(sequence)):
            free_word(model, own_prompts(sequence, concept))

    def measure(self, lab: Lab, concepts: list[Concept]) -> list[Seen | Number]:
        """Return what is seen in images of the prompts with the tokens that were found."""
        found: list[Seen | Number] = []
        for concept in concepts:
            words = self._search(lab, concept)
            found += lab.look(
                [
                    ProbeImage(each.concept, each.cross, f"{words} {each.prompt}", each.seed, i)
                    for i, each in enumerate(
                        evaluation_images(lab.sequence, [concept], self._number)
                    )
                ]
            )
        return found

    def _search(self, lab: Lab, concept: Concept) -> str:
        """Return the tokens of the lowest loss, as text."""
        model = lab.model
        chosen = spread_over(own_prompts(lab.sequence, concept), self._examples)
        latents = lab.latents(chosen, self._examples)
        word = " ".join([free_word(model, chosen)] * self._tokens)
        prompts = [f"{word} {prompt}" for prompt in chosen]
        generator = lab.generator("unlearndiffatk", concept.name)
        allowed = plain_tokens(model, concept.prompt_name)
        table = model.prompts.embeddings()[0][allowed]
        first = torch.randint(len(allowed), (self._tokens,), generator=generator)
        soft = table[first].clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([soft], lr=self._lr, weight_decay=self._decay)
        best, lowest = first, float("inf")
        for _ in range(self._steps):
            nearest = nearest_tokens(soft.detach(), table)
            hard = table[nearest].clone().requires_grad_(True)
            noise = lab.generator("unlearndiffatk", concept.name, "noise")  # losses are compared
            with torch.enable_grad(), distributed.alone():
                text = model.prompts.encode_replaced(prompts, word, [hard])
                loss = batch_loss(model, latents, text, self._batch_size, noise)
                loss.backward()
            if loss.item() < lowest:
                best, lowest = nearest, loss.item()
            soft.grad = hard.grad
            optimizer.step()
        return words_of(model, allowed[best.cpu()][None])[0]

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return the images of so many concepts, and the steps of their searches."""
        return Cost(self._number * concepts, self._steps * concepts)


def nearest_tokens(soft: Tensor, table: Tensor) -> Tensor:
    """Return which row of the table [V, D] is nearest to each of soft [K, D]; [K]."""
    return torch.cdist(soft, table).argmin(1)
