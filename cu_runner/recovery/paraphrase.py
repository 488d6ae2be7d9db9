"""Prompts that mean the concept and do not name it (EMMA, arXiv 2512.17320; HUB, arXiv 2410.05664).

The levels are a synonym or variant, a short and a long description. By name is what UA measures.
"""

from __future__ import annotations

import re
from collections import Counter

from pydantic import PositiveInt

from cu_runner.concepts.entries import comparable
from cu_runner.concepts.prompt_csv import read_list
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.concepts.templates import check_template, fill
from cu_runner.recovery.base import Cost, Lab, Probe, ProbeImage, crosses_of, require_distinct
from cu_runner.schema.settings import Every

KEY, COLUMNS = "recovery.paraphrase.prompts", ("concept", "level", "prompt")


class Paraphrase(Probe):
    """Draws prompts of a list, some at each level."""

    reads_words = "says the concept in other words"

    def __init__(
        self,
        prompts: str | list[str],
        *,
        images: PositiveInt = 4,
        levels: list[str] | None = None,
        every: Every = 1,
        controls: PositiveInt = 4,
    ) -> None:
        """
        Args:
            prompts: a list that ships with the package, or a CSV file with the columns concept,
                level, prompt; a prompt may hold a placeholder of the other domain, as {object}.
                Several: their rows together.
            images: of a concept at each level.
            levels: which; None is all that the list has of the concepts that are probed.
            every, controls: as for Probe.

        Raises:
            ValueError: a list that cannot be read, or that names a concept.
        """
        super().__init__(every, controls)
        lists = [prompts] if isinstance(prompts, str) else prompts
        if not lists:
            raise ValueError(f"{KEY}: is empty; give a list or a CSV file")
        rows = [row for name in lists for row in read_list(KEY, name, COLUMNS)]
        found = list(dict.fromkeys(row["level"] for row in rows))
        if levels is not None:
            require_distinct("recovery.paraphrase.levels", levels)
        if unknown := sorted(set(levels or ()) - set(found)):
            raise ValueError(
                f"recovery.paraphrase.levels: {' and '.join(lists)} has no level {unknown[0]!r}; "
                "it has " + ", ".join(found)
            )
        self._levels = found if levels is None else levels
        self._prompts, self._number = ", ".join(lists), images
        self._rows: dict[str, dict[str, list[str]]] = {}  # by comparable() name, and level
        for row in rows:
            refuse_named(row["concept"], row["prompt"])
            by_level = self._rows.setdefault(comparable(row["concept"]), {})
            by_level.setdefault(row["level"], []).append(row["prompt"])

    def check(self, sequence: Sequence) -> None:
        """Raise ValueError for a concept that lacks a level, or a placeholder that is unknown.

        The strongest level is that of all concepts: each needs what the others have.
        """
        levels = self._levels_of(sequence)
        for concept in self._probed(sequence):
            own = self._rows.get(comparable(concept.name), {})
            if lacking := [level for level in levels or self._levels if level not in own]:
                raise ValueError(
                    f"{KEY}={self._prompts}: has no row of {concept.name!r} at the level "
                    f"{lacking[0]!r}; every concept needs one at each level: give a CSV file with "
                    "the columns concept, level, prompt, choose recovery.paraphrase.levels, or "
                    "leave paraphrase out"
                )
            for template in (each for prompts in own.values() for each in prompts):
                refuse_named(concept.prompt_name, template)
                check_template(template, "recovery.paraphrase", (), (sequence.cross_domain,))

    def _probed(self, sequence: Sequence) -> list[Concept]:
        """Return the concepts of a domain that may be probed."""
        return [*sequence.targets, *self.on_retained(sequence)]

    def _levels_of(self, sequence: Sequence) -> list[str]:
        """Return the levels that the lists have of the concepts of a domain."""
        rows = [self._rows.get(comparable(concept.name), {}) for concept in self._probed(sequence)]
        return [level for level in self._levels if any(level in own for own in rows)]

    def images(self, lab: Lab, concepts: list[Concept]) -> list[ProbeImage]:
        """Return images of every level: its prompts in turn, with other concepts of the other
        domain; where both have been before, with the next seed, and fewer when there is none.
        """
        sequence, found = lab.sequence, list[ProbeImage]()
        seeds = sequence.seeds or (0,)
        for concept in concepts:
            for level in self._levels_of(sequence):
                templates, drawn = self._rows[comparable(concept.name)][level], Counter[str]()
                for i, cross in enumerate(crosses_of(sequence, self._number)):
                    template = templates[i % len(templates)]
                    prompt = fill(template, **{sequence.cross_domain: cross})
                    if (before := drawn[prompt]) == len(seeds):
                        continue
                    shown, number = cross if prompt != template else "", drawn.total()
                    seed = seeds[before]
                    found.append(ProbeImage(concept.name, shown, prompt, seed, number, level))
                    drawn[prompt] += 1
        return found

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return the images of so many concepts, at every level."""
        return Cost(images=self._number * len(self._levels_of(sequence)) * concepts)


def refuse_named(name: str, prompt: str) -> None:
    """Raise ValueError for a prompt that names its concept, whatever stands between the words."""
    words, said = (re.findall(r"[^\W_]+", comparable(text)) for text in (name, prompt))
    if any(said[i : i + len(words)] == words for i in range(len(said))):
        raise ValueError(f"{KEY}: {prompt!r} names {name}; a paraphrase does without the name")
