"""A sequence whose targets are of several domains: a style, then an object, then a style again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Annotated, TypeVar

from pydantic import ConfigDict, NonNegativeInt
from pydantic.dataclasses import dataclass

from cu_runner.concepts.entries import comparable
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.concepts.sequence_file import (
    FOLDER,
    ORDERS,
    composed,
    make_sequence,
    refuse_respelled,
    reorder,
)
from cu_runner.schema.words import Matches

Value = TypeVar("Value")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class DomainLists:
    """What a mixed sequence says of one domain; each as make_sequence() has it."""

    cross_domain: str
    retain: list[str]
    cross_retain: str | list[str]
    vocabulary: str | list[str]
    prompt: str
    target_prompt: str | list[str]
    anchor_prompt: str
    captions: str | list[str] | dict[str, str | list[str]]
    seeds: list[NonNegativeInt]
    anchors: dict[str, str] | None = None
    prompt_names: dict[str, str] | None = None
    bare_prompt: str = "{concept}"


def make_mixed_sequence(
    name: Annotated[str, Matches(r"\w[\w.-]{0,63}", FOLDER)],
    targets: list[dict[str, str]],
    domains: dict[str, DomainLists],
    order: Annotated[str, Matches(r"paper|reversed|shuffle-\d+", ORDERS)] = "paper",
    images: dict[str, str] | None = None,
    anchor_images: dict[str, str] | None = None,
) -> Sequence:
    """Check the lists of a mixed sequence and build it; it faces the domain of the first target.

    Args:
        targets: in order of request, each under its domain: {style: blaze}.
        domains: what is retained, prompted and drawn beside the targets, by domain.
        order: of the requests: as listed, reversed, or a shuffle with a seed of its own.
        images, anchor_images: folders of pictures by target, as make_sequence() has them.

    Raises:
        ValueError: names the entry that is wrong.
    """
    pairs = list(read_targets(targets, list(domains)))
    names = [target for _, target in pairs]
    refuse_respelled("sequence.targets", names)
    if len(set(names)) < len(names):
        twice = next(target for target in names if names.count(target) > 1)
        raise ValueError(f"sequence.targets lists {twice} more than once; name each entry once")
    for key, folders in {"images": images, "anchor_images": anchor_images}.items():
        known = {comparable(target) for target in names}
        if strangers := [each for each in folders or {} if comparable(each) not in known]:
            raise ValueError(
                f"sequence.{key}.{strangers[0]}: is not in sequence.targets; known: "
                f"{', '.join(names)}"
            )
    parts = {}
    for domain, lists in domains.items():
        own = [target for kind, target in pairs if kind == domain]
        if not own:
            raise ValueError(
                f"sequence.domains.{domain}: no target is of it; add one to sequence.targets, or "
                "take the domain out"
            )
        try:
            parts[domain] = make_sequence(
                name,
                domain,
                targets=own,
                images=of_targets(images, own),
                anchor_images=of_targets(anchor_images, own),
                **asdict(lists),
            )
        except ValueError as error:
            raise ValueError(f"sequence.domains.{domain}: {error}") from None
    require_one_domain_each(parts)
    concepts = {concept.name: concept for part in parts.values() for concept in part.targets}
    ordered = tuple(concepts[target] for target in reorder(names, order))
    return replace(
        parts[ordered[0].domain],
        targets=ordered,
        parts=parts,
        target_pictures=merged(part.target_pictures for part in parts.values()),
        anchor_pictures=merged(part.anchor_pictures for part in parts.values()),
    )


def read_targets(targets: list[dict[str, str]], domains: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (domain, name) of every target. Raises ValueError."""
    for number, entry in enumerate(targets):
        if len(entry) != 1 or (domain := next(iter(entry))) not in domains:
            raise ValueError(
                f"sequence.targets.{number}: {entry} is no target under its domain; write one of "
                + ", ".join(f"{{{domain}: NAME}}" for domain in domains)
            )
        yield domain, composed(entry[domain])


def of_targets(folders: dict[str, str] | None, targets: list[str]) -> dict[str, str]:
    """Return the folders of some targets."""
    own = {comparable(target) for target in targets}
    return {name: place for name, place in (folders or {}).items() if comparable(name) in own}


def require_one_domain_each(parts: dict[str, Sequence]) -> None:
    """Raise ValueError for a name that is measured in two domains, or kept by one that lose it."""
    seen: dict[str, str] = {}
    gone = {
        (concept.domain, comparable(concept.name))
        for part in parts.values()
        for concept in part.targets
    }
    for domain, part in parts.items():
        for concept in (*part.targets, *part.retain):
            other = seen.setdefault(comparable(concept.name), domain)
            if other != domain:
                raise ValueError(
                    f"sequence.domains: {concept.name} is measured as {other} and as {domain}; "
                    "every target and retained concept needs a name of its own"
                )
        lost = [each for each in part.cross_retain if is_target(each, gone)]
        if lost:
            raise ValueError(
                f"sequence.domains.{domain}.cross_retain: {lost[0].name} is a target of "
                f"{lost[0].domain}, and RA-C is over what is kept; take it out"
            )


def is_target(concept: Concept, gone: set[tuple[str, str]]) -> bool:
    """Tell whether a concept is to be unlearned, in this spelling or another."""
    return (concept.domain, comparable(concept.name)) in gone


def merged(mappings: Iterator[dict[str, Value]]) -> dict[str, Value]:
    """Return one mapping of several that share no key."""
    return {key: value for each in mappings for key, value in each.items()}
