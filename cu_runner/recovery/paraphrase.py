"""Prompts that mean the concept and do not name it (EMMA, arXiv 2512.17320; HUB, arXiv 2410.05664).

The levels are a synonym or variant, a short and a long description. By name is what UA measures.
"""

from __future__ import annotations

import re

from pydantic import PositiveInt

from cu_runner.concepts.entries import comparable
from cu_runner.concepts.prompt_csv import read_list
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.concepts.templates import check_template, fill
from cu_runner.recovery.base import Cost, Lab, Probe, ProbeImage, crosses_of
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
            levels: which; None is all that the list has.
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
        if levels is not None and (unknown := sorted(set(levels) - set(found))):
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
        """Raise ValueError for a concept without a paraphrase, or a placeholder that is unknown."""
        for concept in (*sequence.targets, *self.on_retained(sequence)):
            own = self._rows.get(comparable(concept.name), {})
            if not any(level in own for level in self._levels):
                raise ValueError(
                    f"{KEY}={self._prompts}: has no row of {concept.name!r} "
                    f"at the levels {', '.join(self._levels)}; give a CSV file with the columns "
                    "concept, level, prompt, or leave paraphrase out"
                )
            for template in (each for prompts in own.values() for each in prompts):
                refuse_named(concept.prompt_name, template)
                check_template(template, "recovery.paraphrase", (), (sequence.cross_domain,))

    def images(self, lab: Lab, concepts: list[Concept]) -> list[ProbeImage]:
        """Return images of every level: its prompts in turn, with other concepts of the other
        domain.
        """
        sequence, found = lab.sequence, list[ProbeImage]()
        seed = sequence.seeds[0] if sequence.seeds else 0
        for concept in concepts:
            for level in self._levels:
                templates = self._rows[comparable(concept.name)].get(level, [])
                crosses = crosses_of(sequence, self._number)
                # fewer where neither prompt nor cross concept is another
                made: dict[str, ProbeImage] = {}
                for i, cross in enumerate(crosses if templates else ()):
                    prompt = fill(templates[i % len(templates)], **{sequence.cross_domain: cross})
                    shown = cross if prompt != templates[i % len(templates)] else ""
                    made.setdefault(
                        prompt,
                        ProbeImage(concept.name, shown, prompt, seed, len(made), variant=level),
                    )
                found += made.values()
        return found

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return the images of so many concepts, at every level."""
        return Cost(images=self._number * len(self._levels) * concepts)


def refuse_named(name: str, prompt: str) -> None:
    """Raise ValueError for a prompt that names its concept, whatever stands between the words."""
    words, said = (re.findall(r"[^\W_]+", comparable(text)) for text in (name, prompt))
    if any(said[i : i + len(words)] == words for i in range(len(said))):
        raise ValueError(f"{KEY}: {prompt!r} names {name}; a paraphrase does without the name")
