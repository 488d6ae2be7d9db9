"""A Sequence of a file of conf/sequence: its lists read and checked."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Annotated
from unicodedata import normalize

from pydantic import NonNegativeInt

from cu_runner.concepts.entries import comparable, read_entries
from cu_runner.concepts.picture_folder import PictureFolder, read_folder
from cu_runner.concepts.prompt_csv import read_prompts
from cu_runner.concepts.sequence import KNOWN, Concept, ImagePrompt, Sequence
from cu_runner.concepts.templates import check_template, replace_word
from cu_runner.schema.words import Matches

composed = partial(normalize, "NFC")
FOLDER = "up to 64 letters, digits and . - _, for a folder of outputs/runs"
ORDERS = "paper, reversed, or shuffle-1 and so on"


def make_sequence(
    name: Annotated[str, Matches(r"\w[\w.-]{0,63}", FOLDER)],
    domain: str,
    cross_domain: str,
    targets: list[str],
    retain: list[str],
    cross_retain: str | list[str],
    vocabulary: str | list[str],
    prompt: str,
    target_prompt: str | list[str],
    anchor_prompt: str,
    captions: str | list[str] | dict[str, str | list[str]],
    seeds: list[NonNegativeInt],
    anchors: dict[str, str] | None = None,
    prompt_names: dict[str, str] | None = None,
    bare_prompt: str = "{concept}",
    order: Annotated[str, Matches(r"paper|reversed|shuffle-\d+", ORDERS)] = "paper",
    prompts: str | None = None,
    images: dict[str, str] | None = None,
    anchor_images: dict[str, str] | None = None,
) -> Sequence:
    """Check the lists of a sequence file (conf/sequence) and build the Sequence.

    Args:
        cross_retain, vocabulary, captions: the entries themselves, the name of a shipped list
            (cu_runner/concepts/lists), or the path of a text file with one entry a line. captions
            may also be a mapping: for each anchor, captions that hold its word, which training
            replaces by the target's.
        target_prompt: one template, or several of which training takes one at random.
        anchors: maps a target to what {anchor} in anchor_prompt stands for.
        prompt_names: maps labels to their names in training prompts, where these are not the labels
            with spaces for underscores.
        bare_prompt: the concept alone, as SelFT scores it: {concept} Style.
        order: of the requests: as listed, reversed, or a shuffle with a seed of its own.
        prompts: a CSV file with a row per evaluation image, in place of prompt and seeds: columns
            prompt, concept, seed, and one named after cross_domain if RA-C is to be measured.
        images: for some targets, a folder of pictures that show it: what methods that train on
            images of a target take in place of generated ones.
        anchor_images: for some targets, a folder of pictures of what is to be drawn in its place.

    Raises:
        ValueError: names the entry that is wrong.
    """
    cross_retain = read_entries("sequence.cross_retain", cross_retain)
    vocabulary = read_entries("sequence.vocabulary", vocabulary)
    # labels, prompts and files may write an accent in two ways
    targets, retain = ([composed(name) for name in names] for names in (targets, retain))
    anchors, prompt_names = (
        {composed(name): composed(other) for name, other in (names or {}).items()}
        for names in (anchors, prompt_names)
    )
    templates = [target_prompt] if isinstance(target_prompt, str) else target_prompt
    anchor_captions: dict[str, tuple[str, ...]] = {}
    if isinstance(captions, dict):
        anchor_captions = read_anchor_captions(captions, targets, anchors)
        captions = without_anchors(anchor_captions)
    else:
        captions = read_entries("sequence.captions", captions)
    lists: dict[str, list[str] | list[int]] = {
        "targets": targets,
        "retain": retain,
        "cross_retain": cross_retain,
        "captions": captions,
        "seeds": seeds,
        "target_prompt": templates,
    }
    for label, entries in lists.items():
        refuse_repeated(f"sequence.{label}", entries)
        if label in ("targets", "retain", "cross_retain"):
            refuse_respelled(f"sequence.{label}", entries)
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
    erased = {comparable(target) for target in targets}
    if both := sorted(kept for kept in retain if comparable(kept) in erased):
        raise ValueError(
            f"sequence {name}: {', '.join(both)} is both in targets (to unlearn) and in retain, in "
            "this spelling or another; remove it from one"
        )
    strangers = sorted(set(anchors) - set(targets))
    if strangers:
        raise ValueError(
            f"sequence.anchors names {', '.join(strangers)}, which is not in sequence.targets"
        )
    check_template(prompt, "sequence.prompt", (domain, cross_domain), ())
    for template in templates:
        check_template(template, "sequence.target_prompt", needed_in_target(anchor_captions), KNOWN)
    check_template(anchor_prompt, "sequence.anchor_prompt", (), ("anchor", "caption"))
    check_template(bare_prompt, "sequence.bare_prompt", ("concept",), ())
    if strange := sorted(set(prompt_names) - {*targets, *retain, *vocabulary}):
        raise ValueError(
            f"sequence.prompt_names names {strange[0]}, which is in none of targets, retain and "
            "vocabulary"
        )
    if "{anchor}" in anchor_prompt and set(targets) - set(anchors):
        raise ValueError(
            f"sequence.anchors lacks {', '.join(t for t in targets if t not in anchors)}; "
            f"anchor_prompt uses {{anchor}}"
        )
    sequence = Sequence(
        name=name,
        targets=tuple(
            Concept(target, domain, anchors.get(target), prompt_names.get(target))
            for target in reorder(targets, order)
        ),
        retain=tuple(Concept(kept, domain, spelling=prompt_names.get(kept)) for kept in retain),
        cross_retain=tuple(Concept(kept, cross_domain) for kept in cross_retain),
        vocabulary=tuple(vocabulary),
        prompt=prompt,
        target_prompt=tuple(templates),
        anchor_prompt=anchor_prompt,
        captions=tuple(captions),
        seeds=tuple(seeds),
        anchor_captions=anchor_captions,
        prompt_names=prompt_names,
        bare_prompt=bare_prompt,
        target_pictures=read_folders("sequence.images", images or {}, targets),
        anchor_pictures=read_folders("sequence.anchor_images", anchor_images or {}, targets),
    )
    if prompts is None:
        return sequence
    return replace(sequence, listed_images=read_listed_images(sequence, prompts))


def refuse_repeated(key: str, entries: Iterable[object]) -> None:
    """Raise ValueError for an entry that a list has more than once."""
    if repeated := sorted(str(entry) for entry, count in Counter(entries).items() if count > 1):
        raise ValueError(f"{key} lists {', '.join(repeated)} more than once; name each entry once")


def refuse_respelled(key: str, entries: Iterable[object]) -> None:
    """Raise ValueError for two entries of a list that are spellings of one name."""
    first: dict[str, object] = {}
    for entry in entries:
        if (same := first.setdefault(comparable(str(entry)), entry)) != entry:
            raise ValueError(
                f"{key} lists {same} and {entry}, two spellings of one name; name each entry once"
            )


def needed_in_target(anchor_captions: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return what a target's prompt must hold: its name, or captions that hold an anchor's word."""
    return ("caption",) if anchor_captions else ("concept",)


def read_anchor_captions(
    captions: dict[str, str | list[str]], targets: list[str], anchors: dict[str, str]
) -> dict[str, tuple[str, ...]]:
    """Read the captions of every anchor, each of which must hold the anchor's word.

    Raises:
        ValueError: names the anchor, or the caption, that is wrong.
    """
    wanted = list(dict.fromkeys(anchors.get(target, "") for target in targets))
    if missing := [target for target in targets if target not in anchors]:
        raise ValueError(
            f"sequence.anchors lacks {', '.join(missing)}; captions by anchor need one for every "
            "target"
        )
    if sorted(captions) != sorted(wanted):
        raise ValueError(
            f"sequence.captions has captions for {', '.join(captions)}; the anchors are "
            f"{', '.join(wanted)}"
        )
    read = {}
    for anchor, source in captions.items():
        key = f"sequence.captions.{anchor}"
        read[anchor] = tuple(read_entries(key, source))
        if not read[anchor]:
            raise ValueError(f"{key} is empty; it needs at least one entry")
        refuse_repeated(key, read[anchor])
        if wrong := [text for text in read[anchor] if replace_word(text, anchor, "") is None]:
            raise ValueError(
                f"{key}: {wrong[0]!r} does not hold the word {anchor!r}, in whose place the target "
                "is named"
            )
    return read


def without_anchors(anchor_captions: dict[str, tuple[str, ...]]) -> list[str]:
    """Return all captions with {concept} in the place of the anchor's word, anchors in turn."""
    longest = max(len(captions) for captions in anchor_captions.values())
    replaced = [
        replace_word(captions[i], anchor, "{concept}") or ""
        for i in range(longest)
        for anchor, captions in anchor_captions.items()
        if i < len(captions)
    ]
    return list(dict.fromkeys(replaced))


def read_listed_images(sequence: Sequence, path: str) -> tuple[ImagePrompt, ...]:
    """Read the images of a user's CSV file.

    Raises:
        ValueError: a concept is unknown or missing, or an image is listed twice.
    """
    key, cross_domain = "sequence.prompts", sequence.cross_domain
    needed, more = ("prompt", "concept", "seed"), (cross_domain,)
    rows = read_prompts(key, path, needed, more=more, distinct=(*needed, cross_domain))
    known = [concept.name for concept in (*sequence.targets, *sequence.retain)]
    names, others = (
        {comparable(name): name for name in spelled}
        for spelled in (known, [concept.name for concept in sequence.cross_retain])
    )
    images = []
    for row in rows:
        concept, cross = row["concept"], row.get(cross_domain, "")
        concept = names.get(comparable(concept), concept)
        cross = others.get(comparable(cross), cross)
        images.append(ImagePrompt(row["prompt"], int(row["seed"]), concept, cross))
    if strangers := [image.concept for image in images if image.concept not in known]:
        raise ValueError(
            f"{key}={path}: {strangers[0]!r} is neither in sequence.targets nor in sequence.retain"
        )
    shown = {image.concept for image in images}
    if missing := [name for name in known if name not in shown]:
        raise ValueError(
            f"{key}={path}: holds no image of {', '.join(missing)}; every target and retained "
            "concept needs one"
        )
    crosses = {image.cross for image in images}
    kept = {concept.name for concept in sequence.cross_retain}
    if crosses != {""} and (wrong := sorted(crosses - kept)):
        raise ValueError(
            f"{key}={path}: {cross_domain} {wrong[0]!r} is not in sequence.cross_retain; leave the "
            "column out, or fill it"
        )
    return tuple(images)


def read_folders(key: str, folders: dict[str, str], targets: list[str]) -> dict[str, PictureFolder]:
    """Find the pictures of every target that has a folder, by the target's name.

    Raises:
        ValueError: a name is none of the targets, or is there twice; or as read_folder().
    """
    names = {comparable(target): target for target in targets}
    refuse_respelled(key, folders)
    if strangers := [name for name in folders if comparable(name) not in names]:
        raise ValueError(
            f"{key}.{strangers[0]}: is not in sequence.targets; known: {', '.join(targets)}"
        )
    found = {}
    for name, folder in folders.items():
        target = names[comparable(name)]
        found[target] = read_folder(f"{key}.{name}", folder)
    return found


def reorder(targets: list[str], order: str) -> list[str]:
    """Return the targets as listed ("paper"), "reversed", or in the order of "shuffle-<seed>"."""
    if order == "reversed":
        return targets[::-1]
    if order == "paper":
        return targets
    return random.Random(int(order.removeprefix("shuffle-"))).sample(targets, len(targets))
