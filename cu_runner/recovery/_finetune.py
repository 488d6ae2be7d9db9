"""What relearning, inversion and attacks share: images of a concept, and the loss on them.

Shapes: B batch, N images, C latent channels, H W latent size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.text import Text
from cu_runner.runtime.lazy import F, torch
from cu_runner.schema.errors import ModelError

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedTokenizerBase

WORDS = "sks zxc qj x z"  # of which the first that is one token, and in no prompt, is taken


def anchored(sequence: Sequence, concept: Concept) -> Concept:
    """Return a concept with an anchor: a retained one has that of the first target."""
    return concept if concept.anchor else replace(concept, anchor=sequence.targets[0].anchor)


def own_prompts(sequence: Sequence, concept: Concept) -> list[str]:
    """Return training prompts that name the concept, once each. Raises ValueError without any."""
    pairs = sequence.training_prompts(anchored(sequence, concept))
    found = [named[0] for named, _ in pairs if named[0].count(concept.prompt_name) == 1]
    if not found:
        raise ValueError(
            f"recovery: none of the training prompts of {concept.name!r} has its name once, as "
            f"{pairs[0][0][0]!r} shows; mend sequence.target_prompt or the captions, or leave "
            "relearning, inversion and unlearndiffatk out"
        )
    return found


def unrelated_prompts(sequence: Sequence, concept: Concept) -> list[str]:
    """Return training prompts of what stands in the concept's place: they do not name it."""
    return [anchor for _, anchor in sequence.training_prompts(anchored(sequence, concept))]


def spread_over(prompts: list[str], number: int) -> list[str]:
    """Return `number` prompts, evenly spread; again from the first where there are fewer."""
    count = min(number, len(prompts))
    chosen = [prompts[i * len(prompts) // count] for i in range(count)]
    return [chosen[i % count] for i in range(number)]


def batch_loss(
    model: DiffusionModel, latents: Tensor, text: Text, batch_size: int, generator: Generator
) -> Tensor:
    """Return E ||e(x_t, c) - eps||^2 on a random batch   (Ho et al. 2020, eq. 14).

    Args:
        latents: [N, C, H, W]. text: of as many prompts.
        generator: draws images, timesteps and noise.
    """
    rows = torch.randint(len(latents), (batch_size,), generator=generator)
    timesteps = model.draw_timesteps(generator, batch_size)
    noise = torch.randn((batch_size, *model.latent_shape), generator=generator).to(model.device)
    timesteps = timesteps.to(model.device)
    clean = latents[rows].to(model.device)
    noisy = model.add_noise(clean, noise, timesteps)
    predicted = model.predict(noisy, timesteps, text[rows.tolist()])
    return F.mse_loss(predicted, model.target(clean, noise))


def free_word(model: DiffusionModel, prompts: list[str]) -> str:
    """Return a word of one token that is in none of the prompts. Raises ModelError."""
    words = {word for prompt in prompts for word in prompt.casefold().split()}
    for word in WORDS.split():
        found = [
            (one_token(tokenizer, word), tokenizer.unk_token_id)
            for tokenizer in model.prompts.tokenizers
        ]
        if word not in words and all(len(ids) == 1 and ids[0] != no for ids, no in found):
            return word
    raise ModelError(
        "recovery: no one token stands for any of "
        f"{', '.join(WORDS.split())} in every tokenizer of the model, and a search needs one"
    )


def first_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """Return the id of a word of one token."""
    return int(one_token(tokenizer, word)[0])


def one_token(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """Return the tokens of a word in a prompt, behind a space where that makes fewer (Gemma)."""
    forms = [tokenizer(lead + word, add_special_tokens=False).input_ids for lead in ("", " ")]
    # CLIP and T5 read both alike
    return list(forms[1] if forms[0] != forms[1] else forms[0])
