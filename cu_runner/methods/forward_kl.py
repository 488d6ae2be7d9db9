"""Constrained unlearning of data, forward KL: min KL(q||p) subject to KL(q_i||p) >= b_i (arXiv
2605.30825).

The minimiser p ~ q - sum lam_i q_i is learnt with the diffusion loss on q's data, in which the n_i
samples of group i weigh v = 1/N - lam_i/n_i. At lam_i = n_i/N they weigh nothing: that is
retraining without the group, and the default cap. A few steps of it from trained weights forget
little, for nothing in the data then speaks of the group's prompts; the status says so. Beyond the
cap the loss ascends on the group and is unbounded, so that a stop is asked for, and the ascending
gradient is kept short.

A step costs 1.7 times ConAbl's, 2.1 with ascent.

Shapes: B batch, C latent channels, H W latent size, P trainable weights in one vector, m unlearning
concepts (groups of data).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveFloat, PositiveInt

from cu_runner.methods._forgetting import add_gradient, captioned, forget_set
from cu_runner.methods._primal_dual import DualAscent, Duals, PrimalDual, group_means, squared_error
from cu_runner.models.text import Text
from cu_runner.request.images import NoisyBatch, RetainSet, diffusion_loss
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import torch
from cu_runner.schema.settings import ParameterGroup

if TYPE_CHECKING:
    from torch import Tensor


def forget_weights(lam: Tensor, sizes: Tensor, total: int) -> Tensor:
    """Return v_j = 1/N - lam_i/n_i of every sample j of forget group i, [m].

    All other samples weigh 1/N. sizes: n_i [m]. total: N.
    """
    return 1 / total - lam / sizes


def shorten(ascent: Tensor, descent: Tensor, ratio: float) -> Tensor:
    """Scale the ascending gradient [P] down to at most `ratio` times the norm of the descending."""
    return ascent * (
        ratio * descent.norm() / ascent.norm().clamp(min=torch.finfo(ascent.dtype).tiny)
    ).clamp(max=1)


@dataclass(frozen=True)
class DataBatch:
    """Images of the groups under noise with the group of each row, and images of what is kept."""

    forget: NoisyBatch
    groups: list[int]
    retain: NoisyBatch


class ForwardKL(PrimalDual[DataBatch]):
    """Keep to the data without the groups, as far as the constraints ask."""

    pictured = "targets"

    def __init__(
        self,
        bound: PositiveFloat = 0.5,
        cap: PositiveFloat = 1.0,
        ascent_stop: PositiveFloat | None = None,
        ascent_ratio: PositiveFloat = 1.0,
        num_images: PositiveInt = 200,
        num_fresh: PositiveInt = 40,
        retain: RetainSet = RetainSet(),
        dual: DualAscent = DualAscent(),
        params: ParameterGroup = "kv_xattn",
    ) -> None:
        """
        Args:
            bound: b_i: by how much the group's diffusion loss must exceed that of the weights at
                the start, as a fraction of it.
            cap: the largest lam_i in units of n_i/N. Above 1 the loss ascends on the group, which
                needs ascent_stop.
            ascent_stop: a group on which the loss has grown by this fraction on average is not
                ascended on.
            ascent_ratio: largest norm of the ascending gradient, as a fraction of the descending
                one's.
            num_images: n_i, images of each concept made by the untouched model; of pictures in
                sequence.images at most.
            num_fresh: further images of each concept, never trained on, for the final constraint.
                They are taken from its pictures, too.
            retain: the rest of q's data.
            dual: the dual ascent.
            params: the weights that are trained.

        Raises:
            ValueError: a cap above 1 without a stop above the bound.
        """
        if cap > 1 and ascent_stop is None:
            raise ValueError(
                f"method.cap={cap}: beyond 1 the loss ascends without bound; set "
                "method.ascent_stop, or a cap of 1 at most"
            )
        if ascent_stop is not None and ascent_stop <= bound:
            raise ValueError(
                f"method.ascent_stop={ascent_stop}: must exceed method.bound={bound}, which it "
                "would else put out of reach"
            )
        self.bound, self.cap = bound, cap
        self.ascent_stop, self.ascent_ratio = ascent_stop, ascent_ratio
        self.ascends, self.least_pictures = ascent_stop is not None, num_fresh + 1
        self.num_images, self.num_fresh, self.retain = num_images, num_fresh, retain
        self.dual, self.params = dual, params

    def begin_request(self, scope: Scope) -> None:
        """Make q's data: images of every group and of what is kept, by the untouched model.

        All have their own captions.
        """
        self._groups, self._fresh, self._captions = [], [], []
        sizes, number = [], self.num_images + self.num_fresh
        for shown in forget_set(scope, number):
            images = captioned(scope, [shown], number=number)
            # pictures may be fewer: as many are held out, and the rest is trained on
            size = images.sizes[0] - self.num_fresh
            self._fresh.append(images.latents[0, size:])
            self._captions.append(shown.per_image(number)[size:])
            images.latents, images.sizes = images.latents[:, :size], [size]
            self._groups.append(images)
            sizes.append(size)
        self._retain = self.retain.images_of(scope)
        self._kept = self._retain.sizes[0]
        self._sizes = torch.tensor(sizes, dtype=torch.float64)
        self._total = sum(sizes) + self._kept
        caps = self.cap * self._sizes / self._total
        ones = torch.ones_like(self._sizes)  # values are relative to the loss at the start
        self.duals = Duals(
            self.dual, ones, self.bound * ones, "at least", lambda lam: lam.minimum(caps)
        )

    def batch(self, scope: Scope, step: int) -> DataBatch:
        """Draw as many images of the groups, about equally many of each, as of what is kept."""
        number = len(self._groups)
        generator = scope.rng.generator("train", step)
        chosen = torch.randperm(number, generator=generator)[: scope.batch_size].tolist()
        counts = [len(range(k, scope.batch_size, len(chosen))) for k in range(len(chosen))]
        parts = [
            self._groups[group].draw(generator, count)
            for group, count in zip(chosen, counts, strict=True)
        ]
        groups = [group for group, count in zip(chosen, counts, strict=True) for _ in range(count)]
        return DataBatch(join(parts), groups, self._retain.draw(generator, scope.batch_size))

    def terms(self, scope: Scope, batch: DataBatch) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Return two parts of sum_j v_j ||e(x_t, c) - eps||^2, and what to log.

        The first part is that of samples with v_j >= 0, the second of those that are ascended on.
        """
        number, forget = len(self._groups), batch.forget
        arguments = (forget.noisy, forget.timesteps, forget.texts[0])
        losses = squared_error(scope.model.predict(*arguments), forget.wanted)
        with torch.no_grad():
            before = squared_error(scope.model.predict(*arguments, scope.start), forget.wanted)
        growth = (
            group_means(losses, batch.groups, number) / group_means(before, batch.groups, number)
            - 1
        )
        logs = {"forget_loss": losses.mean().item(), **self.duals.note(growth)}
        weights = forget_weights(self.duals.lam, self._sizes, self._total)
        if self.ascent_stop is not None:
            weights = torch.where(
                self.duals.averaged() > self.ascent_stop, weights.clamp(min=0), weights
            )
        # a row stands for the samples of its group, of which each has about as many rows
        share = (number * self._sizes / len(losses))[batch.groups].to(losses)
        rows = share * weights[batch.groups].to(losses)
        retain = diffusion_loss(scope.model, batch.retain)
        logs["retain_loss"] = retain.item()
        descent = (self._kept / self._total) * retain + (rows.clamp(min=0) * losses).sum()
        return descent, (rows.clamp(max=0) * losses).sum(), logs

    def loss(self, scope: Scope, batch: DataBatch) -> tuple[Tensor, dict[str, float]]:
        """Return sum_j v_j ||e(x_t, c) - eps||^2 over the forget groups and the kept data."""
        descent, ascent, logs = self.terms(scope, batch)
        return descent + ascent, logs

    def backward(self, scope: Scope, batch: DataBatch) -> dict[str, float]:
        """Add the loss's gradient; its ascending part may not outgrow the descending one."""
        descent, ascent, logs = self.terms(scope, batch)
        if ascent.item() == 0:
            descent.backward()
        else:
            params = list(scope.params.values())
            down, up = (
                torch.cat(
                    [
                        gradient.flatten()
                        for gradient in torch.autograd.grad(part, params, retain_graph=True)
                    ]
                )
                for part in (descent, ascent)  # both hang on the same pass over the groups' images
            )
            add_gradient(scope.params, down + shorten(up, down, self.ascent_ratio))
        return {"loss": (descent + ascent).item(), **logs}

    def final_constraint(self, scope: Scope) -> Tensor:
        """Return the growth of the diffusion loss on the groups' held-out images."""
        model, values = scope.model, []
        for i, (latents, captions) in enumerate(zip(self._fresh, self._captions, strict=True)):
            after, before = [], []
            for n in range(self.dual.rounds):
                generator = scope.rng.generator(f"final {i}", n)
                timesteps = model.draw_timesteps(generator, self.num_fresh).to(model.device)
                noise = torch.randn(latents.shape, generator=generator).to(model.device)
                clean = latents.to(model.device)
                noisy = model.add_noise(clean, noise, timesteps)
                wanted = model.target(clean, noise)
                for start in range(0, self.num_fresh, scope.batch_size):
                    rows = slice(start, start + scope.batch_size)
                    arguments = (noisy[rows], timesteps[rows], model.encode_prompts(captions[rows]))
                    after.append(squared_error(model.predict(*arguments), wanted[rows]))
                    before.append(
                        squared_error(model.predict(*arguments, scope.start), wanted[rows])
                    )
            values.append(
                (torch.cat(after).double().mean() / torch.cat(before).double().mean() - 1).cpu()
            )
        return torch.stack(values)


def join(parts: list[NoisyBatch]) -> NoisyBatch:
    """Return one batch of the rows of several."""
    texts = tuple(Text.cat(texts) for texts in zip(*(part.texts for part in parts), strict=True))
    noisy, wanted, timesteps = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("noisy", "wanted", "timesteps")
    )
    return NoisyBatch(noisy, wanted, timesteps, texts)
