"""What methods train on: images that the untouched model makes of prompts, noised.

They come with the text of those prompts or of others.

Shapes: B batch, C latent channels, H W latent size, L tokens, D text width, G concepts, N images
and M prompts per concept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass as checked_dataclass

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.text import Text
from cu_runner.request.name_sources import NameSource, kept_names, read_listed
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import F, torch

if TYPE_CHECKING:
    from torch import Generator, Tensor

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class NoisyBatch:
    """Images under noise. texts: of B prompts, one for each list of captions."""

    noisy: Tensor  # [B, C, H, W]
    noise: Tensor  # [B, C, H, W]
    timesteps: Tensor  # [B]
    texts: tuple[Text, ...]


class CaptionedImages:
    """Images of some prompts, made by the untouched model, each with one or more captions."""

    def __init__(
        self,
        scope: Scope,
        captions: list[list[str]],
        *further: list[list[str]] | list[list[tuple[str, ...]]],
        number: int,
        flip: bool = False,
    ) -> None:
        """
        Args:
            captions: [G][M] prompts, from which the images are made.
            further: each [G][M] more texts for the same images: prompts, or several prompts of
                which a draw takes one at random.
            number: images per concept; image i is made from prompt i modulo M.
            flip: mirror half of the images left to right when they are drawn.
        """
        self._model, self.flip = scope.model, flip
        device = scope.model.device
        self.latents = torch.stack([scope.anchors(prompts, number) for prompts in captions]).to(
            device
        )  # [G, N, C, H, W]
        if flip:
            self.mirrored = torch.stack(
                [scope.anchors(prompts, number, mirrored=True) for prompts in captions]
            ).to(device)
        # [kind][G], one Text of M prompts for each way of saying it
        self.texts = [
            [
                [
                    scope.model.encode_prompts(list(ways))
                    for ways in zip(*map(as_tuple, prompts), strict=True)
                ]
                for prompts in groups
            ]
            for groups in (captions, *further)
        ]

    def draw(self, generator: Generator, batch_size: int) -> NoisyBatch:
        """Draw a batch by the generator alone.

        It draws concepts, images, timesteps, noise, mirroring, and one of several prompts.
        """
        model, device = self._model, self._model.device
        concepts = torch.randint(len(self.latents), (batch_size,), generator=generator).tolist()
        images = torch.randint(self.latents.shape[1], (batch_size,), generator=generator).tolist()
        timesteps = torch.randint(model.num_train_timesteps, (batch_size,), generator=generator).to(
            device
        )
        noise = torch.randn((batch_size, *model.latent_shape), generator=generator).to(device)
        clean = self.latents[concepts, images]
        if self.flip:
            chosen = (torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5).to(device)
            clean = torch.where(chosen, self.mirrored[concepts, images], clean)
        texts = tuple(self._texts_of(groups, concepts, images, generator) for groups in self.texts)
        return NoisyBatch(model.add_noise(clean, noise, timesteps), noise, timesteps, texts)

    def _texts_of(
        self, groups: list[list[Text]], concepts: list[int], images: list[int], generator: Generator
    ) -> Text:
        """Return the text of each row's image, one of several at random where there are several."""
        several, rows = len(groups[0]), [0] * len(concepts)
        if several > 1:
            rows = torch.randint(several, (len(concepts),), generator=generator).tolist()
        chosen = [groups[concept][way] for concept, way in zip(concepts, rows, strict=True)]
        places = [image % len(text) for image, text in zip(images, chosen, strict=True)]
        return Text.cat(
            [text[place : place + 1] for text, place in zip(chosen, places, strict=True)]
        )


def as_tuple(prompts: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return several prompts as they are, and one as the only of them."""
    return (prompts,) if isinstance(prompts, str) else prompts


def diffusion_loss(model: DiffusionModel, batch: NoisyBatch) -> Tensor:
    """Return E ||e(x_t, c) - eps||^2 with the prompts that the images were made from   (Ho et al.
    2020, eq. 14).
    """
    return F.mse_loss(
        model.predict_noise(batch.noisy, batch.timesteps, batch.texts[0]), batch.noise
    )


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RetainSet:
    """Prompts of what is to be kept, and how many images of them are made.

    source: "anchors", the targets' anchor prompts; "names", other concepts of the domain in the
    sequence's target prompt; "both"; a "list" of prompts that ships with the package; or a "file"
    of the user's with one prompt a line. name: which list, or the path of the file. prompts: how
    many at most, spread evenly over all there are. images: how many.
    """

    source: Literal["anchors", "names", "both", "list", "file"] = "both"
    name: str | None = None
    names: NameSource = NameSource()
    prompts: PositiveInt = 100
    images: PositiveInt = 200

    def __post_init__(self) -> None:
        """Raise ValueError for a list or a file that cannot be read, before a model is loaded."""
        if self.source in ("list", "file"):
            read_listed(self.source, self.name)

    def read(self, scope: Scope) -> list[str]:
        """Return the prompts, in a fixed order; those of the sequence name no target.

        Raises:
            ValueError: there are none.
        """
        sequence = scope.sequence
        if self.source in ("list", "file"):
            found = spread(read_listed(self.source, self.name), self.prompts)
        else:
            anchors = [
                anchor
                for concept in scope.request.targets
                for _, anchor in sequence.training_pairs(concept)
            ]
            names = kept_names(scope, self.names)
            prompts = [sequence.prompts_naming(name) for name in names]
            # name i meets caption i first: a few prompts already hold every name and caption
            named = [
                naming[(i + shift) % len(naming)]
                for shift in range(len(sequence.captions))
                for i, naming in enumerate(prompts)
            ]
            share = {"anchors": self.prompts, "both": (self.prompts + 1) // 2, "names": 0}[
                self.source
            ]
            found = spread(list(dict.fromkeys(anchors)), share)
            if self.source != "anchors":
                share = self.prompts - len(found)
                # every name comes before any comes a second time
                found += spread(named[: max(len(names), share)], share)
        if not found:
            raise ValueError(
                "retain: no prompt is left beside the targets and the retained concepts; choose "
                "another source"
            )
        return found

    def images_of(self, scope: Scope) -> CaptionedImages:
        """Make the images of these prompts, of as many of them as there are images."""
        return CaptionedImages(scope, [spread(self.read(scope), self.images)], number=self.images)


def spread(entries: list[Entry], number: int) -> list[Entry]:
    """Return at most `number` of the entries, in order and evenly spaced."""
    count = min(number, len(entries))
    return [entries[i * len(entries) // count] for i in range(count)]
