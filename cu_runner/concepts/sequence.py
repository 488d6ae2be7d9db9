"""Concepts, and sequences of them to unlearn.

Sequence files are checked here. The values hold no model and no randomness.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from cu_runner.concepts.entries import read_entries
from cu_runner.concepts.prompt_csv import read_prompts


@dataclass(frozen=True)
class Concept:
    """One thing that prompts can name.

    name: as it stands in prompts. domain: "style", "object", "celebrity", ... anchor: what to draw
    in its place, or None.
    """

    name: str
    domain: str
    anchor: str | None = None


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
    target_prompt: str  # training prompt of the concept: placeholders {concept}, {caption}
    anchor_prompt: str  # training prompt of its anchor: placeholders {anchor}, {caption}
    captions: tuple[str, ...]  # what {caption} runs through
    seeds: tuple[int, ...]  # evaluation noise seeds; one image per prompt and seed
    # evaluation images of one's own, in place of prompt and seeds
    images: tuple[ImagePrompt, ...] = ()

    @property
    def domain(self) -> str:
        """Return the domain of the targets."""
        return self.targets[0].domain

    @property
    def cross_domain(self) -> str:
        """Return the other domain."""
        return self.cross_retain[0].domain

    def training_pairs(self, concept: Concept) -> list[tuple[str, str]]:
        """Return (target prompt, anchor prompt) pairs of one concept, one per caption."""
        return [
            (
                self.target_prompt.format(concept=concept.name, caption=caption),
                self.anchor_prompt.format(anchor=concept.anchor or "", caption=caption),
            )
            for caption in self.captions
        ]

    @property
    def measured_domains(self) -> tuple[str, ...]:
        """Return the domains in which images are classified.

        Images of one's own need not name a concept of the other domain.
        """
        return (
            (self.domain, self.cross_domain)
            if all(image.cross for image in self.images)
            else (self.domain,)
        )

    def evaluation_images(self, concepts: Iterable[Concept]) -> list[ImagePrompt]:
        """Return the images by which these concepts are measured.

        They are the grid with cross_retain and seeds, or the user's own.
        """
        if self.images:
            return [
                image
                for concept in concepts
                for image in self.images
                if image.concept == concept.name
            ]
        return [
            ImagePrompt(self.evaluation_prompt(concept, cross), seed, concept.name, cross.name)
            for concept in concepts
            for cross in self.cross_retain
            for seed in self.seeds
        ]

    def evaluation_prompt(self, concept: Concept, cross: Concept) -> str:
        """Return the prompt of an image that shows both concepts."""
        return self.prompt.format(**{concept.domain: concept.name, cross.domain: cross.name})


def make_sequence(
    name: Annotated[str, Field(pattern=r"^\w[\w.-]{0,63}$")],  # a folder of outputs/runs
    domain: str,
    cross_domain: str,
    targets: list[str],
    retain: list[str],
    cross_retain: str | list[str],
    vocabulary: str | list[str],
    prompt: str,
    target_prompt: str,
    anchor_prompt: str,
    captions: str | list[str],
    seeds: list[int],
    anchors: dict[str, str] | None = None,
    order: Annotated[str, Field(pattern=r"^(paper|reversed|shuffle-\d+)$")] = "paper",
    prompts: str | None = None,
) -> Sequence:
    """Check the lists of a sequence file (conf/sequence) and build the Sequence.

    Args:
        cross_retain, vocabulary, captions: the entries themselves, the name of a shipped list
            (cu_runner/concepts/lists), or the path of a text file with one entry a line.
        anchors: maps a target to what {anchor} in anchor_prompt stands for.
        order: of the requests: as listed, reversed, or a shuffle with a seed of its own.
        prompts: a CSV file with a row per evaluation image, in place of prompt and seeds: columns
            prompt, concept, seed, and one named after cross_domain if RA-C is to be measured.

    Raises:
        ValueError: names the entry that is wrong.
    """
    cross_retain = read_entries("sequence.cross_retain", cross_retain)
    vocabulary = read_entries("sequence.vocabulary", vocabulary)
    captions = read_entries("sequence.captions", captions)
    lists: dict[str, list[str] | list[int]] = {
        "targets": targets,
        "retain": retain,
        "cross_retain": cross_retain,
        "captions": captions,
        "seeds": seeds,
    }
    for label, entries in lists.items():
        repeated = sorted(str(entry) for entry, count in Counter(entries).items() if count > 1)
        if repeated:
            raise ValueError(
                f"sequence.{label} lists {', '.join(repeated)} more than once; name each entry once"
            )
        if not entries:
            raise ValueError(f"sequence.{label} is empty; it needs at least one entry")
        strange = [
            entry
            for entry in entries
            if isinstance(entry, str) and not (entry.strip() and entry.isprintable())
        ]
        if strange:
            raise ValueError(
                f"sequence.{label}: {strange[0]!r} is blank or holds a line break or control "
                "character; take it out"
            )
    if domain == cross_domain:
        raise ValueError(
            f"sequence {name}: domain and cross_domain are both {domain}; they must differ"
        )
    both = sorted(set(targets) & set(retain))
    if both:
        raise ValueError(
            f"sequence {name}: {', '.join(both)} is both in targets (to unlearn) and in retain; "
            "remove it from one"
        )
    anchors = anchors or {}
    strangers = sorted(set(anchors) - set(targets))
    if strangers:
        raise ValueError(
            f"sequence.anchors names {', '.join(strangers)}, which is not in sequence.targets"
        )
    if "{anchor}" in anchor_prompt and set(targets) - set(anchors):
        raise ValueError(
            f"sequence.anchors lacks {', '.join(t for t in targets if t not in anchors)}; "
            f"anchor_prompt uses {{anchor}}"
        )
    sequence = Sequence(
        name=name,
        targets=tuple(
            Concept(target, domain, anchors.get(target)) for target in reorder(targets, order)
        ),
        retain=tuple(Concept(kept, domain) for kept in retain),
        cross_retain=tuple(Concept(kept, cross_domain) for kept in cross_retain),
        vocabulary=tuple(vocabulary),
        prompt=prompt,
        target_prompt=target_prompt,
        anchor_prompt=anchor_prompt,
        captions=tuple(captions),
        seeds=tuple(seeds),
    )
    for field, template, needed in (
        ("prompt", prompt, {domain, cross_domain}),
        ("target_prompt", target_prompt, {"concept"}),
    ):
        missing = sorted(key for key in needed if f"{{{key}}}" not in template)
        if missing:
            raise ValueError(
                f"sequence.{field} {template!r} lacks the placeholder {{{missing[0]}}}"
            )
    try:
        sequence.evaluation_prompt(sequence.targets[0], sequence.cross_retain[0])
        sequence.training_pairs(sequence.targets[0])
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"sequence {name}: a prompt has an unknown placeholder {error}; see conf/sequence for "
            "examples"
        ) from None
    return sequence if prompts is None else replace(sequence, images=read_images(sequence, prompts))


def read_images(sequence: Sequence, path: str) -> tuple[ImagePrompt, ...]:
    """Read the images of a user's CSV file.

    Raises:
        ValueError: a concept is unknown or missing, or an image is listed twice.
    """
    key, cross_domain = "sequence.prompts", sequence.cross_domain
    rows = read_prompts(key, path, ("prompt", "concept", "seed"))
    images = [
        ImagePrompt(row["prompt"], int(row["seed"]), row["concept"], row.get(cross_domain, ""))
        for row in rows
    ]
    known = [concept.name for concept in (*sequence.targets, *sequence.retain)]
    if strangers := [image.concept for image in images if image.concept not in known]:
        raise ValueError(
            f"{key}={path}: {strangers[0]!r} is neither in sequence.targets nor in sequence.retain"
        )
    if missing := [name for name in known if name not in {image.concept for image in images}]:
        raise ValueError(
            f"{key}={path}: holds no image of {', '.join(missing)}; every target and retained "
            "concept needs one"
        )
    if twice := [image for image in images if images.count(image) > 1]:
        raise ValueError(
            f"{key}={path}: {twice[0].prompt!r} with seed {twice[0].seed} is there twice; it would "
            "be one image"
        )
    crosses = {image.cross for image in images}
    kept = {concept.name for concept in sequence.cross_retain}
    if crosses != {""} and (wrong := sorted(crosses - kept)):
        raise ValueError(
            f"{key}={path}: {cross_domain} {wrong[0]!r} is not in sequence.cross_retain; leave the "
            "column out, or fill it"
        )
    return tuple(images)


def reorder(targets: list[str], order: str) -> list[str]:
    """Return the targets as listed ("paper"), "reversed", or in the order of "shuffle-<seed>"."""
    if order == "reversed":
        return targets[::-1]
    if order == "paper":
        return targets
    return random.Random(int(order.removeprefix("shuffle-"))).sample(targets, len(targets))
