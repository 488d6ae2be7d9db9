"""What the probes of recovery saw in a run, by probe and request, for its report.

No drawing, no HTML. Means are those of metrics.csv, before they are rounded. Every file that is
read here is checked by the sha256 that step.json names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cu_runner.evaluators.recovered import (
    CONTROLS,
    Condition,
    accuracy_by_dose,
    at_strongest,
    image_metrics,
    read_recovery,
    strongest,
    value_metrics,
)
from cu_runner.runtime.lazy import pd
from cu_runner.store.layout import RECOVERY, RECOVERY_VALUES
from cu_runner.store.run_record import RunRecord


@dataclass(frozen=True)
class Seen:
    """What a probe saw after a request.

    strongest: the variant and the dose under which most is recognised, by domain; None of a probe
    that gives numbers. rows: of all variants and doses, as accuracy_by_dose() returns them; of a
    probe that gives numbers, its rows of recovery_values.csv. means: by ending of CONTROLS, in the
    strongest variant and dose; NaN where not measured.
    """

    strongest: dict[str, Condition] | None
    rows: pd.DataFrame
    means: dict[str, float]

    @property
    def has_erased(self) -> bool:
        """Tell whether the probe asks for unlearned concepts, not for retained ones alone."""
        return "erased" in set(self.rows["group"])

    def of(self, ending: str) -> pd.DataFrame:
        """Return the rows of the concepts that the probe asks for, or of one of its controls.

        Args:
            ending: "" or that of a control, as in CONTROLS. A probe that asks for retained concepts
                alone has no rows of "_retained".
        """
        group, weights = CONTROLS[ending]
        if not self.has_erased:
            group = "" if group == "retained" else "retained"
        return self.rows[(self.rows["group"] == group) & (self.rows["weights"] == weights)]

    def at_strongest(self) -> pd.DataFrame:
        """Return the rows of these concepts in the strongest variant and dose."""
        rows = self.of("")
        if self.strongest is None:
            return rows
        return rows[rows.index.isin(at_strongest(self.rows).index)]

    def by_concept(self) -> pd.Series:
        """Return the percent recognised, or the mean of its numbers, of each concept."""
        name = "value" if self.strongest is None else "accuracy"
        return self.at_strongest().groupby("concept", sort=False)[name].mean()


Steps = dict[int, Seen]  # what a probe saw, by request


def read_seen(run: RunRecord) -> dict[str, Steps]:
    """Return what the probes of a run saw, by probe in the order of config.yaml, and by request.

    A probe that has not measured yet is left out. Where a probe gives both images and numbers, what
    the images show is returned.

    Raises:
        StoreError: a file of a step is damaged.
    """
    if "recovery" not in run.config:
        return {}
    found: dict[str, Steps] = {str(name): {} for name in run.config["recovery"]}
    for index in range(len(run.records)):
        for probe, seen in (seen_in_numbers(run, index) | seen_in_images(run, index)).items():
            found[probe][index] = seen
    return {probe: steps for probe, steps in found.items() if steps}


def seen_in_images(run: RunRecord, index: int) -> dict[str, Seen]:
    """Return what probes saw in the images of a step; {} without any."""
    rows = rows_of(run, index, RECOVERY)
    if rows is None:
        return {}
    found = {}
    for name, accuracy in accuracy_by_dose(rows, run.domains).groupby("probe", sort=False):
        probe = str(name)
        means = means_of(probe, image_metrics(probe, accuracy))
        found[probe] = Seen(strongest(accuracy), accuracy, means)
    return found


def seen_in_numbers(run: RunRecord, index: int) -> dict[str, Seen]:
    """Return what probes measured at a step without an image; {} without any."""
    rows = rows_of(run, index, RECOVERY_VALUES)
    if rows is None:
        return {}
    found = {}
    for name, values in rows.groupby("probe", sort=False):
        probe = str(name)
        found[probe] = Seen(None, values, means_of(probe, value_metrics(probe, values)))
    return found


def rows_of(run: RunRecord, index: int, name: str) -> pd.DataFrame | None:
    """Return the rows of a file of a step; None where it has none. Raises StoreError."""
    if name not in run.records[index].files:
        return None
    run.require(index, name)
    return read_recovery(run.step_dir(index) / name)


def means_of(probe: str, metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of a probe by ending of CONTROLS; NaN where there is none."""
    return {ending: metrics.get(f"recovered_{probe}{ending}", math.nan) for ending in CONTROLS}


def counts(tables: list[pd.DataFrame]) -> tuple[int, int]:
    """Return how many images show their concept, and how many there are; 0 and 0 of numbers."""
    if "images" not in tables[0]:
        return 0, 0
    hits, images = (sum(int(rows[name].sum()) for rows in tables) for name in ("hits", "images"))
    return hits, images
