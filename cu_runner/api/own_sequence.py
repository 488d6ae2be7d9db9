"""A sequence for concepts that are in no file of conf/sequence: their prompts and anchors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cu_runner.api.model import Model
from cu_runner.api.settings import listed
from cu_runner.concepts.entries import comparable, read_shipped
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.concepts.templates import check_template, replace_word
from cu_runner.request.nearest_anchor import Distance, nearest_by_prediction
from cu_runner.runtime.progress import note
from cu_runner.schema.errors import ConfigError

KINDS = ("style", "object", "person")
# What training says of a concept that has an anchor, and of the anchor in its place.
PROMPTS = (
    "a photo of {concept}",
    "an image of {concept}",
    "a picture of {concept}",
    "a painting of {concept}",
    "a drawing of {concept}",
    "a close-up of {concept}",
)


@dataclass(frozen=True)
class Words:
    """What a model knows: captions without a style, and names by kind (shipped lists)."""

    captions: str
    names: Mapping[str, str]
    caption: str = "{caption}"  # how a caption becomes a prompt


SHIPPED = Words(
    "painting_captions",
    {"style": "painting_styles", "object": "common_objects", "person": "celebrities"},
)
OWN = Words(
    "shapecanvas_objects",
    {"style": "shapecanvas_styles", "object": "shapecanvas_objects", "person": "celebrities"},
    "a {caption}",
)
PEOPLE = ("a man", "a woman", "a person", "a child", "an old man", "an old woman")


def words_of(model: Model) -> Words:
    """Return the lists that a model's prompts are taken from."""
    return OWN if model.preset.startswith("shapecanvas") else SHIPPED


def kind_of(concept: str) -> str:
    """Return what a concept is: a style where its name ends so, else an object."""
    return "style" if comparable(concept).split()[-1:] == ["style"] else "object"


def own_sequence(
    model: Model,
    concepts: str | Iterable[str],
    *,
    kind: str | None = None,
    anchors: Mapping[str, str] | None = None,
    prompts: str | Iterable[str] | None = None,
    captions: str | Iterable[str] | None = None,
    vocabulary: str | Iterable[str] | None = None,
    retain: str | Iterable[str] = (),
    seed: int = 0,
) -> Sequence:
    """Return a sequence of a person's own concepts.

    A style without an anchor is trained to be its prompt without the style: "a house, in X" as "a
    house". Everything else has an anchor, whose name stands in its place: given, or the nearest of
    the names that the model knows (nearest_anchor), which is said on stderr.

    Args:
        kind: style, object or person; None is style for a name that ends in "style", else object.
        anchors: what to draw in a concept's place, by concept.
        prompts: with {concept}, of training; None are PROMPTS. They need anchors.
        captions: of styles: what is drawn in them; None is a shipped list.
        vocabulary: names of other concepts, which regularizers keep; None is a shipped list.
        retain: names that must survive; regularizers never train on them.
        seed: by which anchors are chosen.

    Raises:
        ConfigError: no concept, one twice, an unknown kind, prompts without {concept}.
    """
    names, kept_names = listed(concepts), listed(retain)
    if not names or not all(names) or len({comparable(name) for name in names}) < len(names):
        raise ConfigError(f"concepts: {names} is empty, or names one twice; name each once")
    if len(kinds := {kind or kind_of(name) for name in names}) > 1:
        raise ConfigError(
            f"concepts: {', '.join(names)} are of several kinds; give kind=, or one call for each"
        )
    kind = kinds.pop()
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r}: allowed: {', '.join(KINDS)}")
    given = dict(anchors or {})
    if strange := sorted(set(given) - set(names)):
        raise ConfigError(f"anchors: names {strange[0]!r}, which is not among the concepts")
    shipped = words_of(model)
    every = listed(vocabulary) if vocabulary is not None else read_shipped(shipped.names[kind])
    banned = {comparable(name) for name in (*names, *kept_names, *model.unlearned)}
    known = [name for name in every if comparable(name) not in banned]
    kept = tuple(Concept(name, kind) for name in kept_names)
    if kind == "style" and not given and prompts is None:
        said = listed(captions) if captions is not None else read_shipped(shipped.captions)
        ends = {name: comparable(name).split()[-1] == "style" for name in names}
        if len(set(ends.values())) > 1:
            raise ConfigError("concepts: name all of them with the word style at the end, or none")
        form = f"{shipped.caption}, in {{concept}}" + ("" if ends[names[0]] else " style")
        targets = tuple(Concept(name, kind) for name in names)
        return sequence_of(targets, kept, known, tuple(said), (form, shipped.caption), {})
    forms = tuple(listed(prompts)) if prompts is not None else PROMPTS
    for form in forms:
        check_template(form, "prompts", ("concept",), ())
    for name in names:
        if name not in given:
            among = None if kind == "person" else known
            found = nearest_anchor(
                model, name, prompts=forms, candidates=among, kind=kind, seed=seed
            )
            given[name] = found[0].text
            more = ", ".join(f"{each.text} {each.squared:.4g}" for each in found[1:4])
            note(
                f"anchor of {name}: {given[name]} (distance {found[0].squared:.4g}; next: "
                f"{more or 'none'}); anchors={{...}} names another"
            )
    for anchor in given.values():
        for form in forms:
            if replace_word(form.replace("{concept}", ""), anchor, "") is not None:
                raise ConfigError(
                    f"anchors: {anchor!r} is a word of the prompt {form!r} too, and could not be "
                    "told from the concept there; give other prompts=[...] or another anchor"
                )
    by_anchor = {
        anchor: tuple(form.replace("{concept}", anchor) for form in forms)
        for anchor in given.values()
    }
    targets = tuple(Concept(name, kind, given[name]) for name in names)
    return sequence_of(targets, kept, known, forms, ("{caption}", "{caption}"), by_anchor)


def sequence_of(
    targets: tuple[Concept, ...],
    retain: tuple[Concept, ...],
    vocabulary: list[str],
    captions: tuple[str, ...],
    templates: tuple[str, str],
    anchor_captions: dict[str, tuple[str, ...]],
) -> Sequence:
    """Return a sequence that is trained on and not measured: it has no other domain.

    templates: target_prompt and anchor_prompt.
    """
    return Sequence(
        name="own",
        targets=targets,
        retain=retain,
        cross_retain=(),
        vocabulary=tuple(vocabulary),
        prompt=f"an image of {{{targets[0].domain}}}",
        target_prompt=templates[:1],
        anchor_prompt=templates[1],
        captions=captions,
        seeds=(),
        anchor_captions=anchor_captions,
    )


def nearest_anchor(
    model: Model,
    concept: str,
    *,
    prompts: str | Iterable[str] = PROMPTS,
    candidates: str | Iterable[str] | None = None,
    kind: str | None = None,
    seed: int = 0,
) -> list[Distance]:
    """Return candidates for a concept's anchor, the nearest by the model's predictions first.

    Args:
        prompts: with {concept}, in which the concept and every candidate are named.
        candidates: None are the names of its kind that the model knows; of a person, of whom, not
            who: "a man", "a woman", ...
        kind: as for own_sequence().
        seed: of the images on which predictions are compared.

    Raises:
        ValueError: there is no candidate beside the concept itself.
    """
    kind = kind or kind_of(concept)
    if candidates is not None:
        names = listed(candidates)
    else:
        names = list(PEOPLE) if kind == "person" else read_shipped(words_of(model).names[kind])
    forms = listed(prompts)
    others = {
        name: [form.replace("{concept}", name) for form in forms]
        for name in names
        if comparable(name) != comparable(concept)
    }
    wanted = [form.replace("{concept}", concept) for form in forms]
    return nearest_by_prediction(model.untouched.diffusion, wanted, others, seed=seed)
