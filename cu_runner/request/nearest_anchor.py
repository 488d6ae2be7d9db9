"""Which text a model draws most like a concept: an anchor, where nobody names one.

The distance of two prompts is that of the model's predictions, not of their texts (Lee et al.
2025, "Distill, Forget, Repeat", arXiv 2512.02657, its mapping of concepts).

Shapes: B batch, C latent channels, H W latent size, K draws, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.sampling import sample_latents
from cu_runner.runtime.lazy import F, torch, without_gradients
from cu_runner.runtime.progress import counted
from cu_runner.runtime.seeding import derive_seed
from cu_runner.schema.settings import Sampler

if TYPE_CHECKING:
    from torch import Tensor

DRAWS = 32  # latents and timesteps, as published
SHORTLIST = 16  # candidates that are nearest as text, of which the predictions are compared
DRAWN = Sampler(steps=20, guidance=1.0)  # of the images of the concept, as published


@dataclass(frozen=True)
class Distance:
    """text: the candidate. squared: the mean squared difference of its prediction."""

    text: str
    squared: float


@without_gradients
def nearest_by_prediction(
    model: DiffusionModel,
    wanted: list[str],
    candidates: dict[str, list[str]],
    *,
    draws: int = DRAWS,
    shortlist: int = SHORTLIST,
    seed: int = 0,
    batch_size: int = 8,
) -> list[Distance]:
    """Order candidates by E ||e(x_t, t, p) - e(x_t, t, q)||^2, the nearest first.

    p are the prompts of the concept and q those of a candidate; x_0 are images that the model
    makes of p, t is uniform over the noise schedule.

    Args:
        wanted: M prompts of the concept.
        candidates: per candidate M prompts, each as that of the concept with it in its place.
        draws: K, over which the mean is taken; draw k has prompt k modulo M.
        shortlist: how many candidates are compared by predictions: those whose text is nearest to
            the concept's, by the cosine of mean hidden states.
        seed: of latents, timesteps and noise, which are the same for all candidates.
        batch_size: rows of a forward pass.

    Raises:
        ValueError: there is no candidate, or the model reads no words.
    """
    if not candidates:
        raise ValueError("anchors: there is no candidate to choose from; name an anchor")
    if not model.prompts.reads_words:
        raise ValueError(
            "anchors: are chosen by text, and the model reads the names of classes; name an anchor"
        )
    chosen = nearest_texts(model, wanted, candidates, shortlist)
    device = model.device
    generator = torch.Generator().manual_seed(derive_seed("nearest anchor", seed))
    prompts = [wanted[k % len(wanted)] for k in range(draws)]
    seeds = [derive_seed("nearest anchor", seed, k) for k in range(draws)]
    timesteps = model.draw_timesteps(generator, draws)
    noise = torch.randn((draws, *model.latent_shape), generator=generator)
    parts = [slice(i, i + batch_size) for i in range(0, draws, batch_size)]
    noisy = []
    for part in parts:
        clean = sample_latents(model, prompts[part], seeds[part], DRAWN)
        noisy.append(model.add_noise(clean, noise[part].to(device), timesteps[part].to(device)))

    def predictions(texts: list[str]) -> Tensor:
        """Return the predicted noise [K, C, H, W] of the draws under M prompts."""
        rows = [texts[k % len(texts)] for k in range(draws)]
        made = [
            model.predict(x, timesteps[part].to(device), model.encode_prompts(rows[part]))
            for x, part in zip(noisy, parts, strict=True)
        ]
        return torch.cat(made)

    target = predictions(wanted)
    found = [
        Distance(chosen[i], F.mse_loss(predictions(candidates[chosen[i]]), target).item())
        for i in counted("choose an anchor", len(chosen), "candidate")
    ]
    return sorted(found, key=lambda each: each.squared)


def nearest_texts(
    model: DiffusionModel, wanted: list[str], candidates: dict[str, list[str]], number: int
) -> list[str]:
    """Return the candidates whose prompts are nearest to the wanted ones as text, in their order.

    By the cosine of the mean hidden state [D] over prompts and tokens.
    """

    def mean(texts: list[str]) -> Tensor:
        text = model.encode_prompts(texts)
        return text.hidden.mean(dim=(0, 1)) if text.mask is None else text.positions().mean(0)

    names = list(candidates)
    vectors = torch.stack([mean(candidates[name]) for name in names])
    cosine = F.cosine_similarity(vectors, mean(wanted)[None], dim=1)
    best = set(cosine.topk(min(number, len(names))).indices.tolist())
    return [name for i, name in enumerate(names) if i in best]
