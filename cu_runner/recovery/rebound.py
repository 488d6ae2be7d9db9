"""Whether concepts come back by later requests: the rise of their accuracy since the lowest before.

It costs nothing: predictions.csv of the earlier steps has it.
"""

from __future__ import annotations

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.evaluators.metrics import accuracy_per_concept
from cu_runner.evaluators.recovered import RISE
from cu_runner.recovery.base import Cost, Lab, Number, Probe, Seen
from cu_runner.schema.settings import Every


class Rebound(Probe):
    """Reports, in points, how far a concept's accuracy lies above its lowest since its request."""

    reads_earlier = True

    def __init__(self, *, every: Every = 1) -> None:
        """Take `every` as Probe does. The retained concepts and the untouched model have none."""
        super().__init__(every, controls=0)

    def measure(self, lab: Lab, concepts: list[Concept]) -> list[Seen | Number]:
        """Return the rise of each earlier concept."""
        found: list[Seen | Number] = []
        domain = lab.sequence.domain
        seen = [accuracy_per_concept(lab.predictions(step), domain) for step in range(lab.step + 1)]
        for concept in concepts:
            # before its own request a target is measured in the untouched model alone
            known = [accuracy[concept.name] for accuracy in seen[1:] if concept.name in accuracy]
            if len(known) > 1:
                found.append(Number(concept.name, known[-1] - min(known), RISE))
        return found

    def cost(self, sequence: Sequence, concepts: int) -> Cost:
        """Return nothing: no image is made."""
        return Cost()

    def has_untouched(self) -> bool:
        """Return False: the untouched model has unlearned nothing."""
        return False
