"""Concepts, and sequences of them to unlearn. The values hold no model and no randomness."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from cu_runner.concepts.picture_folder import PictureFolder
from cu_runner.concepts.templates import fill, fill_caption, replace_word

KNOWN = ("concept", "caption")  # placeholders of a target's training prompt


@dataclass(frozen=True)
class Concept:
    """One thing that prompts can name.

    name: its label, as classifiers and evaluation prompts have it. domain: "style", "object",
    "celebrity", ... anchor: what to draw in its place, or None. spelling: its name in training
    prompts, where that is not the label with spaces for underscores.
    """

    name: str
    domain: str
    anchor: str | None = None
    spelling: str | None = None

    @property
    def prompt_name(self) -> str:
        """Return its name in training prompts: "Van Gogh" for Van_Gogh, "bear" for Bears."""
        return self.spelling or self.name.replace("_", " ")


@dataclass(frozen=True)
class ImagePrompt:
    """One evaluation image, fixed by prompt and seed.

    concept, cross: what it shows, in both domains; cross is "" for nothing.
    """

    prompt: str
    seed: int
    concept: str
    cross: str


@dataclass(frozen=True)
class Sequence:
    """What to unlearn, in which order, and what must survive (UA, RA-I and RA-C rest on these
    lists).

    targets: concepts to unlearn, in order of request. retain: held-out concepts of the same domain.
    cross_retain: concepts of the other domain; every evaluation image shows one of them.
    vocabulary: further names of the target's domain that a regularizer may use as auxiliary
    concepts.
    """

    name: str
    targets: tuple[Concept, ...]
    retain: tuple[Concept, ...]
    cross_retain: tuple[Concept, ...]
    vocabulary: tuple[str, ...]
    # evaluation prompt, one {domain} placeholder per domain: "a {object} image in {style} style"
    prompt: str
    # training prompts of the concept, one or several at random: placeholders {concept}, {caption}
    target_prompt: tuple[str, ...]
    anchor_prompt: str  # training prompt of its anchor: placeholders {anchor}, {caption}
    # what {caption} runs through; where captions hold an anchor's word, {concept} is in its place
    captions: tuple[str, ...]
    seeds: tuple[int, ...]  # evaluation noise seeds; one image per prompt and seed
    # captions that hold the word of an anchor, by anchor; none: captions are for all
    anchor_captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # names in training prompts by label, of those that have a spelling of their own
    prompt_names: dict[str, str] = field(default_factory=dict)
    bare_prompt: str = "{concept}"  # the concept alone, without a caption
    # evaluation images that a table of the user's lists, in place of prompt and seeds
    listed_images: tuple[ImagePrompt, ...] = ()
    # pictures of the user's by target: of itself, and of what is to be drawn in its place
    target_pictures: dict[str, PictureFolder] = field(default_factory=dict)
    anchor_pictures: dict[str, PictureFolder] = field(default_factory=dict)
    # of a mixed sequence: that of each domain, by domain. targets are those of all domains then,
    # and everything else is of the one domain that the sequence faces
    parts: dict[str, Sequence] = field(default_factory=dict)

    @property
    def domain(self) -> str:
        """Return the domain of the targets; of a mixed sequence the one that it faces."""
        return (self.retain or self.targets)[0].domain

    @property
    def cross_domain(self) -> str:
        """Return the other domain."""
        return self.cross_retain[0].domain

    @property
    def by_domain(self) -> list[Sequence]:
        """Return the sequence of every domain of targets; one that is not mixed is the only."""
        return list(self.parts.values()) or [self]

    @property
    def columns(self) -> tuple[str, ...]:
        """Return every domain of which images name a concept."""
        both = ((each.domain, each.cross_domain) for each in self.by_domain)
        return tuple(dict.fromkeys(domain for pair in both for domain in pair))

    def facing(self, concept: Concept) -> Sequence:
        """Return the sequence as methods see it that unlearn a concept: facing its domain."""
        if concept.domain not in self.parts or concept.domain == self.domain:
            return self
        return replace(
            self.parts[concept.domain],
            targets=self.targets,
            parts=self.parts,
            target_pictures=self.target_pictures,
            anchor_pictures=self.anchor_pictures,
        )

    @property
    def retained(self) -> list[Concept]:
        """Return what is retained, in all domains."""
        return [kept for each in self.by_domain for kept in each.retain]

    def _of(self, concept: Concept) -> Sequence:
        """Return the sequence of a concept's domain."""
        return self if concept.domain == self.domain else self.parts.get(concept.domain, self)

    def prompt_name(self, label: str) -> str:
        """Return a name of the targets' domain as training prompts have it."""
        return Concept(label, self.domain, spelling=self.prompt_names.get(label)).prompt_name

    def training_prompts(self, concept: Concept) -> list[tuple[tuple[str, ...], str]]:
        """Return, per caption, the target prompts of one concept and the prompt of its anchor.

        The target prompts say the same in several ways, one for each template.
        """
        if (own := self._of(concept)) is not self:
            return own.training_prompts(concept)
        anchor, name = concept.anchor or "", concept.prompt_name
        pairs = []
        for caption in self.anchor_captions.get(anchor, self.captions):
            # without anchor_captions there is no word to replace
            shown = replace_word(caption, anchor, name) if self.anchor_captions else caption
            targets = (fill_caption(template, shown or "") for template in self.target_prompt)
            wanted = fill(fill_caption(self.anchor_prompt, caption), anchor=anchor)
            pairs.append((tuple(fill(target, concept=name) for target in targets), wanted))
        return pairs

    def training_pairs(self, concept: Concept) -> list[tuple[str, str]]:
        """Return (target prompt, anchor prompt) pairs of one concept, one per caption.

        Of several templates they take one after the other.
        """
        return [
            (targets[i % len(targets)], anchor)
            for i, (targets, anchor) in enumerate(self.training_prompts(concept))
        ]

    def prompts_naming(self, name: str) -> list[str]:
        """Return prompts as the target's, of something else of its domain; one per caption."""
        return [
            fill(
                fill_caption(self.target_prompt[i % len(self.target_prompt)], caption), concept=name
            )
            for i, caption in enumerate(self.captions)
        ]

    @property
    def measured_domains(self) -> tuple[str, ...]:
        """Return the domains in which images are classified.

        Listed images need not name a concept of the other domain.
        """
        if self.parts:
            return self.columns
        return (
            (self.domain, self.cross_domain)
            if all(image.cross for image in self.listed_images)
            else (self.domain,)
        )

    def evaluation_images(self, concepts: Iterable[Concept]) -> list[ImagePrompt]:
        """Return the images by which these concepts are measured.

        They are the grid with cross_retain and seeds, or those that the user lists.
        """
        if self.listed_images:
            return [image for concept in concepts for image in self._listed_of[concept.name]]
        return [
            ImagePrompt(self.evaluation_prompt(concept, cross), seed, concept.name, cross.name)
            for concept in concepts
            for cross in self._of(concept).cross_retain
            for seed in self._of(concept).seeds
        ]

    def num_images(self, concept: Concept) -> int:
        """Return by how many images a concept is measured."""
        if self.listed_images:
            return len(self._listed_of[concept.name])
        own = self._of(concept)
        return len(own.cross_retain) * len(own.seeds)

    def lacks(self, concepts: Iterable[Concept]) -> list[str]:
        """Return the concepts of the other domain that no image of these and the retained shows.

        Of the grid there are none; listed images may lack some, and RA_C is over them all.
        """
        if not self.listed_images or self.cross_domain not in self.measured_domains:
            return []
        shown = {image.cross for image in self.evaluation_images([*concepts, *self.retain])}
        return [kept.name for kept in self.cross_retain if kept.name not in shown]

    @cached_property
    def _listed_of(self) -> dict[str, list[ImagePrompt]]:
        """Return the listed images by concept."""
        found: dict[str, list[ImagePrompt]] = defaultdict(list)
        for image in self.listed_images:
            found[image.concept].append(image)
        return found

    def evaluation_prompt(self, concept: Concept, cross: Concept) -> str:
        """Return the prompt of an image that shows both concepts."""
        prompt = self._of(concept).prompt
        return fill(prompt, **{concept.domain: concept.name, cross.domain: cross.name})
