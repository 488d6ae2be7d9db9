"""How often probes measure that may draw a quarter of the evaluation's images at most.

Those are the images that measure the run; with gates most are taken from the request before, and
not drawn again.
"""

from __future__ import annotations

import itertools

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.recovery.base import Probe, cost_of

QUARTER = "quarter"  # in the place of a number, as recovery.<probe>.every
SHARE = 0.25


def affordable(
    probes: dict[str, Probe], erased: list[list[Concept]], sequence: Sequence
) -> tuple[int, str]:
    """Return after every how many requests these probes can measure, and what a user should know.

    It is the smallest number with which all of them together, the untouched model's controls
    included, draw no more than SHARE of the evaluation's images; the number of requests, with which
    they measure after the last alone, where no smaller one is enough. Nothing is to be said where
    they measure after every request within that share.

    Args:
        probes: are left with that number.
        erased: what is unlearned after each request.
    """
    evaluated = itertools.chain(sequence.targets, *erased)
    images = sum(map(sequence.num_images, evaluated))
    images += (1 + len(erased)) * sum(map(sequence.num_images, sequence.retained))
    for every in range(1, len(erased) + 1):
        for probe in probes.values():
            probe.every = every
        if (drawn := cost_of(probes, erased, sequence).images) <= SHARE * images:
            break
    when = f"after every {every} requests" if every < len(erased) else "after the last alone"
    said = f"recovery: {' and '.join(probes)}: {when}, {drawn} images at most beside {images} of "
    if drawn > SHARE * images:
        return every, f"{said}the evaluation: over a quarter, with these settings of the probes"
    said += "the evaluation; recovery.<probe>.every=1 measures after each"
    return every, said if every > 1 else ""
