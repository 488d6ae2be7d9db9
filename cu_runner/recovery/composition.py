"""Two retained things in one image, in other words than the evaluation's: both must be there.

No unlearned concept is named. Unlearning that breaks how words are put together loses here what it
keeps in RA-I and RA-C. It is no recovery, and no part of UA_worst.
"""

from __future__ import annotations

from pydantic import PositiveInt

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.concepts.templates import check_template, fill
from cu_runner.recovery.base import Cost, Lab, Probe, ProbeImage, crosses_of
from cu_runner.schema.settings import Every


class Composition(Probe):
    """Draws retained concepts together with concepts of the other domain."""

    reads_words = "names the concept beside others"
    asks_erased = False  # what is unlearned is not named

    def __init__(
        self,
        prompts: list[str] | None = None,
        *,
        images: PositiveInt = 4,
        every: Every = 1,
        controls: PositiveInt = 6,
    ) -> None:
        """
        Args:
            prompts: templates that hold a placeholder of each domain; None takes the evaluation's.
            images: of a concept.
            every: as for Probe. controls: so many retained concepts, evenly spread.
        """
        super().__init__(every, controls)
        self._prompts, self._number = prompts, images

    def check(self, sequence: Sequence) -> None:
        """Raise ValueError for templates that do not name both, or without another domain."""
        if not sequence.cross_retain or sequence.cross_domain not in sequence.measured_domains:
            raise ValueError(
                "recovery.composition: images of this sequence name no concept of another domain; "
                "leave composition out"
            )
        for template in self._templates(sequence):
            needed = (sequence.domain, sequence.cross_domain)
            check_template(template, "recovery.composition.prompts", needed, ())

    def _templates(self, sequence: Sequence) -> list[str]:
        return [sequence.prompt] if self._prompts is None else self._prompts

    def images(self, lab: Lab, concepts: list[Concept]) -> list[ProbeImage]:
        """Return images of each concept with others of the other domain, in every wording."""
        sequence, found = lab.sequence, []
        templates = self._templates(sequence)
        seeds, crosses = sequence.seeds or (0,), len(sequence.cross_retain)
        for concept in concepts:
            for i, cross in enumerate(crosses_of(sequence, self._number)):
                names = {sequence.domain: concept.name, sequence.cross_domain: cross}
                prompt = fill(templates[i % len(templates)], **names)
                seed = seeds[i // crosses % len(seeds)]
                found.append(ProbeImage(concept.name, cross, prompt, seed, i, both=True))
        return found

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return the images of so many concepts."""
        return Cost(images=self._number * concepts)
