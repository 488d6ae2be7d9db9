"""What methods train on: images that the untouched model makes of prompts, or pictures of the
user's, noised.

They come with the text of those prompts or of others.

Shapes: B batch, C latent channels, H W latent size, L tokens, D text width, G concepts, N images
and M prompts per concept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass as checked_dataclass

from cu_runner.concepts.entries import spread
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.text import Text
from cu_runner.request.name_sources import NameSource, kept_names, read_listed
from cu_runner.request.own_images import Pictures, read_retained, retained_pictures
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import F, torch

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class NoisyBatch:
    """Images under noise. texts: of B prompts, one for each list of captions.

    wanted: what a perfect model predicts of them: the noise, or of rectified flow the velocity.
    """

    noisy: Tensor  # [B, C, H, W]
    wanted: Tensor  # [B, C, H, W]
    timesteps: Tensor  # [B]
    texts: tuple[Text, ...]


class CaptionedImages:
    """Images of some prompts, made by the untouched model or the user's, each with one or more
    captions.
    """

    def __init__(
        self,
        scope: Scope,
        captions: list[list[str]],
        *further: list[list[str]] | list[list[tuple[str, ...]]],
        number: int,
        flip: bool = False,
        pictures: Sequence[Pictures | None] = (),
    ) -> None:
        """
        Args:
            captions: [G][M] prompts, from which the images are made.
            further: each [G][M] more texts for the same images: prompts, or several prompts of
                which a draw takes one at random.
            number: images per concept; image i is made from prompt i modulo M.
            flip: mirror half of the images left to right when they are drawn.
            pictures: for each concept the user's, which are then its images; None makes some.
        """
        self._model, self.flip = scope.model, flip
        self._given = pictures or [None] * len(captions)
        self.latents = self._images(scope, captions, number, mirrored=False)  # [G, N, C, H, W]
        if flip:
            self.mirrored = self._images(scope, captions, number, mirrored=True)
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

    def _images(
        self, scope: Scope, captions: list[list[str]], number: int, mirrored: bool
    ) -> Tensor:
        """Return latents [G, N, C, H, W]; concepts with fewer than N are filled with zeros."""
        kind = {"mirrored": True} if mirrored else {}
        found = [
            scope.anchors(prompts, number, **kind)
            if own is None
            else own.encode(scope.model, scope.batch_size, mirrored)
            for prompts, own in zip(captions, self._given, strict=True)
        ]
        self.sizes = [len(latents) for latents in found]
        filled = [
            F.pad(latents, (0, 0, 0, 0, 0, 0, 0, max(self.sizes) - len(latents)))
            for latents in found
        ]
        return torch.stack(filled).to(scope.model.device)

    def _choose(self, generator: Generator, concepts: list[int]) -> list[int]:
        """Draw an image of each row's concept."""
        if len(set(self.sizes)) == 1:
            return torch.randint(self.sizes[0], (len(concepts),), generator=generator).tolist()
        places = torch.rand(len(concepts), generator=generator, dtype=torch.float64)
        sizes = torch.tensor([self.sizes[concept] for concept in concepts])
        return (places * sizes).long().tolist()

    def draw(self, generator: Generator, batch_size: int) -> NoisyBatch:
        """Draw a batch by the generator alone.

        It draws concepts, images, timesteps, noise, mirroring, and one of several prompts.
        """
        model, device = self._model, self._model.device
        concepts = torch.randint(len(self.latents), (batch_size,), generator=generator).tolist()
        images = self._choose(generator, concepts)
        timesteps = model.draw_timesteps(generator, batch_size).to(device)
        noise = torch.randn((batch_size, *model.latent_shape), generator=generator).to(device)
        clean = self.latents[concepts, images]
        if self.flip:
            chosen = (torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5).to(device)
            clean = torch.where(chosen, self.mirrored[concepts, images], clean)
        texts = tuple(self._texts_of(groups, concepts, images, generator) for groups in self.texts)
        noisy, wanted = model.add_noise(clean, noise, timesteps), model.target(clean, noise)
        return NoisyBatch(noisy, wanted, timesteps, texts)

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
    2020, eq. 14); of rectified flow E ||v(x_s, c) - (eps - x_0)||^2   (Esser et al. 2024, eq. 2).
    """
    return F.mse_loss(model.predict(batch.noisy, batch.timesteps, batch.texts[0]), batch.wanted)


PICTURED = "retain.name"  # the setting that names a folder of what is to be kept


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RetainSet:
    """Prompts of what is to be kept, and how many images of them are made.

    source: "anchors", the targets' anchor prompts; "names", other concepts of the domain in the
    sequence's target prompt; "both"; a "list" of prompts that ships with the package; a "file" of
    the user's with one prompt a line; or "images", a folder of the user's pictures with captions,
    or with a folder for every concept. name: which list, or the path of the file or the folder.
    prompts: how many at most, spread evenly over all there are. images: how many; of pictures at
    most.
    """

    source: Literal["anchors", "names", "both", "list", "file", "images"] = "both"
    name: str | None = None
    names: NameSource = NameSource()
    prompts: PositiveInt = 100
    images: PositiveInt = 200

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be read, before a model is loaded."""
        if self.source in ("list", "file"):
            read_listed(self.source, self.name)
        if self.source == "images":
            read_retained(PICTURED, self.name)

    def read(self, scope: Scope) -> list[str]:
        """Return the prompts, in a fixed order; those of the sequence name no target.

        Raises:
            ValueError: there are none.
        """
        sequence = scope.sequence
        if self.source in ("list", "file"):
            found = spread(read_listed(self.source, self.name), self.prompts)
        elif self.source == "images":
            texts = dict.fromkeys(caption for _, caption in self._pictures(scope))
            found = spread(list(texts), self.prompts)
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
        """Make the images of these prompts, of as many of them as there are images.

        Pictures of the user's are taken as they are, at most `images` of them.
        """
        if self.source == "images":
            paths, captions = zip(*spread(self._pictures(scope), self.images), strict=True)
            own = Pictures(f"{PICTURED}={self.name}", paths)
            return CaptionedImages(scope, [list(captions)], number=self.images, pictures=[own])
        return CaptionedImages(scope, [spread(self.read(scope), self.images)], number=self.images)

    def _pictures(self, scope: Scope) -> list[tuple[Path, str]]:
        """Return the user's pictures of what is not unlearned, with their captions."""
        gone = [*scope.request.targets, *scope.request.erased]
        return retained_pictures(PICTURED, self.name, scope.sequence, gone)
