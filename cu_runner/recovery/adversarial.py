"""Ring-A-Bell: a prompt is searched on the text encoder alone (Tsai et al. 2024, arXiv 2310.10012).

c = mean over i of f(P_i with the concept) - f(P_i without), f the text encoder; the search looks
for a prompt whose text is near f(P) + eta c   (their eq. 2-4). It knows nothing of the UNet: one
search per concept serves every request, and the found prompt is cached.

Shapes: P prompts, K tokens, L tokens that are read, D text width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import NonNegativeFloat, PositiveInt

from cu_runner.concepts.entries import comparable
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.text import Text
from cu_runner.recovery._finetune import anchored
from cu_runner.recovery.base import Cost, Lab, Probe, ProbeImage
from cu_runner.runtime.lazy import torch
from cu_runner.runtime.progress import Progress
from cu_runner.schema.errors import ModelError
from cu_runner.schema.settings import Every, Fraction

if TYPE_CHECKING:
    from torch import Generator, Tensor

PAIRS = 50  # prompts with and without the concept, at most


class RingABell(Probe):
    """Draws the prompt that a genetic search has found."""

    reads_words = "searches for prompts of tokens"

    def __init__(
        self,
        *,
        tokens: PositiveInt = 16,
        coefficient: NonNegativeFloat = 3.0,
        population: PositiveInt = 200,
        generations: PositiveInt = 3000,
        crossover: Fraction = 0.5,
        mutation: Fraction = 0.25,
        images: PositiveInt = 4,
        every: Every = 1,
        controls: PositiveInt = 4,
    ) -> None:
        """
        Args:
            tokens: K, of the prompt. coefficient: eta.
            population, generations: of the search; half of a population lives on.
            crossover, mutation: how often two prompts are mixed, and one of its tokens is another.
            images: of a concept. every, controls: as for Probe.

        Raises:
            ValueError: a population of one.
        """
        super().__init__(every, controls)
        if population < 4:
            raise ValueError("recovery.adversarial.population: a search needs 4 prompts at least")
        self.steps_once = generations
        self._tokens, self._coefficient = tokens, coefficient
        self._population, self._generations = population, generations
        self._crossover, self._mutation, self._number = crossover, mutation, images

    def images(self, lab: Lab, concepts: list[Concept]) -> list[ProbeImage]:
        """Return images of the prompt that was found for each concept, with several seeds."""
        return [
            ProbeImage(concept.name, "", prompt, seed, seed)
            for concept in concepts
            for prompt in [self._prompt(lab, concept)]
            for seed in range(self._number)
        ]

    def _prompt(self, lab: Lab, concept: Concept) -> str:
        pairs = lab.sequence.training_pairs(anchored(lab.sequence, concept))[:PAIRS]
        key: dict[str, object] = {
            "concept": concept.name,
            "pairs": [list(pair) for pair in pairs],
            "search": [self._tokens, self._coefficient, self._population, self._generations],
            "rates": [self._crossover, self._mutation],
            "device": lab.model.device.type,
        }
        return lab.remember("ring-a-bell", key, lambda: self._search(lab, concept, pairs))

    def _search(self, lab: Lab, concept: Concept, pairs: list[tuple[str, str]]) -> str:
        model = lab.model
        named, plain = (
            seen(model.prompts.encode_once(list(side))) for side in zip(*pairs, strict=True)
        )
        wanted = plain[0] + self._coefficient * (named - plain).mean(0)
        generator = lab.generator("ring-a-bell", concept.name)
        allowed = plain_tokens(model, concept.prompt_name)
        chosen = torch.randint(len(allowed), (self._population, self._tokens), generator=generator)
        tokens = allowed[chosen]
        with Progress(
            f"search a prompt for {concept.name}", self._generations, "generation"
        ) as bar:
            for _ in range(self._generations):
                order = distances(model, tokens, wanted, concept.prompt_name).argsort(stable=True)
                parents = tokens[order[: self._population // 2]]
                tokens = torch.cat([parents, self._children(parents, allowed, generator)])
                bar.advance()
        far = distances(model, tokens, wanted, concept.prompt_name)
        return words_of(model, tokens[far.argmin()][None])[0]

    def _children(self, parents: Tensor, allowed: Tensor, generator: Generator) -> Tensor:
        """Return as many prompts as the population lacks, mixed and mutated."""
        count = self._population - len(parents)
        pairs = torch.randint(len(parents), (2, count), generator=generator)
        cuts = torch.randint(1, max(self._tokens, 2), (count, 1), generator=generator)
        mixed = torch.rand(count, 1, generator=generator) < self._crossover
        after = torch.arange(self._tokens)[None] >= cuts
        children = torch.where(mixed & after, parents[pairs[1]], parents[pairs[0]])
        changed = torch.rand(count, generator=generator) < self._mutation
        places = torch.randint(self._tokens, (count,), generator=generator)
        fresh = allowed[torch.randint(len(allowed), (count,), generator=generator)]
        rows = changed.nonzero().flatten()
        children[rows, places[rows]] = fresh[rows]
        return children

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return the images of so many concepts."""
        return Cost(images=self._number * concepts)


def seen(text: Text) -> Tensor:
    """Return the hidden states [B, L, D], zero where the denoiser does not look."""
    return text.hidden if text.mask is None else text.hidden * text.mask[..., None]


def plain_tokens(model: DiffusionModel, name: str) -> Tensor:
    """Return the ids of the tokens that prompts are made of: words, and none of the name.

    A word that is written is read as its one token again.
    """
    part = model.prompts.parts[0]
    tokenizer = part.tokenizer
    own = {token for ids in part.forms(name) for token in ids} | set(tokenizer.all_special_ids)
    words = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    # behind a space: Gemma's words in a prompt have one
    for lead in ("", " "):
        texts = [lead + word.strip() for word in words]
        read = tokenizer(texts, add_special_tokens=False).input_ids
        found = [token for token, ids in enumerate(read) if ids == [token] and token not in own]
        if len(found) > len(words) // 10:
            break
    if not found:
        raise ModelError("recovery: no token of the model's tokenizer is a word of its own")
    return torch.tensor(found)


def words_of(model: DiffusionModel, tokens: Tensor) -> list[str]:
    """Return prompts of token ids [P, K] as text, which a person could type."""
    return [" ".join(text.split()) for text in model.tokenizer.batch_decode(tokens.tolist())]


def distances(model: DiffusionModel, tokens: Tensor, wanted: Tensor, name: str) -> Tensor:
    """Return the squared distance of each prompt's text to what is wanted [L, D]; [P].

    It is infinite for a prompt that has the concept's name in it.
    """
    prompts = words_of(model, tokens)
    far = (seen(model.prompts.encode_once(prompts)) - wanted).square().flatten(1).sum(1).cpu()
    named = torch.tensor([comparable(name) in comparable(prompt) for prompt in prompts])
    return far.masked_fill(named, float("inf"))
