"""The rows of a report: runs that differ in their seed alone stand as one, all others apart.

Every file that is read here is checked: small ones by the sha256 that step.json names.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cu_runner.reporting.estimates import SHARES, Estimate, image_counts, of_shares, of_sizes
from cu_runner.reporting.unfinished import Outcome, outcome_of
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.schema.values import ConfigTree, numbers_by_value, without_paths
from cu_runner.store.layout import PREDICTIONS, STEP
from cu_runner.store.proof import require_true
from cu_runner.store.run_record import RunRecord, read_run
from cu_runner.store.signature import NOT_SCIENTIFIC, signature

# of the sequence in a run's config.yaml, beside what read_run needs
NEEDED = ("name", "domain", "cross_domain", "retain", "seeds")
NEEDED_MIXED = ("name", "domains")  # of one with targets of several domains
MEASURED = (*SHARES, "drift_l2")
WORDS = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, by seed: one row, one line, one point of a report.

    number: decides colour, dashes and marker. label: unique. outcomes: of each run, if they are not
    finished.
    """

    number: int
    label: str
    runs: list[RunRecord]
    outcomes: list[Outcome]

    @property
    def first(self) -> RunRecord:
        """Return the run of the first seed; all have its configuration but for the seed."""
        return self.runs[0]

    @property
    def title(self) -> str:
        """Return the label, with the number of finished requests when some are missing."""
        return self.label if self.first.complete else f"{self.label} ({self.extent} requests)"

    @property
    def extent(self) -> str:
        """Return "12", or "7 of 12" for unfinished runs."""
        whole = str(self.first.num_requests)
        return whole if self.first.complete else f"{self.last} of {whole}"

    @property
    def seeds(self) -> str:
        """Return "0", "0, 1" or "0 to 2"."""
        return in_words([run.seed for run in self.runs])

    @property
    def last(self) -> int:
        """Return the number of the last finished request."""
        return len(self.first.records) - 1

    @cached_property
    def evaluated(self) -> list[int]:
        """Return the requests after which every seed was evaluated, from 0 on."""
        steps = zip(*(run.records for run in self.runs), strict=True)
        return [index for index, each in enumerate(steps) if all(one.evaluated for one in each)]

    @cached_property
    def estimates(self) -> dict[str, list[Estimate]]:
        """Return by metric (MEASURED) the mean and its interval after each request from 0 on."""
        found: dict[str, list[Estimate]] = {name: [] for name in MEASURED}
        for index in range(self.last + 1):
            several = len(self.runs) > 1 and index in self.evaluated
            counts = image_counts(self.first, index) if several else {}
            for name, estimates in found.items():
                values = [float(run.table[name].iloc[index]) for run in self.runs]
                shares = name in counts
                estimates.append(of_shares(values, counts[name]) if shares else of_sizes(values))
        return found

    def at_end(self, name: str) -> Estimate:
        """Return a metric after the last finished request."""
        return self.estimates[name][-1]

    @cached_property
    def accuracies(self) -> list[pd.DataFrame]:
        """Return of each run the percent recognised: rows concepts, columns requests from 0 on.

        NaN: not measured.

        Raises:
            StoreError: predictions of a step are damaged.
        """
        for run in self.runs:
            for index, record in enumerate(run.records):
                if record.evaluated:
                    run.require(index, PREDICTIONS)
        return [run.accuracy_matrix() for run in self.runs]

    @cached_property
    def accuracy(self) -> pd.DataFrame:
        """Return the mean of `accuracies`."""
        first, *others = self.accuracies
        return sum(others, first) / len(self.runs)

    @cached_property
    def unlearned(self) -> pd.DataFrame:
        """Return True where a cell of `accuracy` is of a concept that is unlearned by then."""
        since = [self.first.requested.get(concept, math.inf) for concept in self.accuracy.index]
        gone = self.accuracy.columns.to_numpy()[None, :] >= np.array(since)[:, None]
        return self.accuracy.notna() & gone


def in_words(seeds: list[int]) -> str:
    """Return sorted seeds as "0", "0, 1", or "0 to 2" of three or more without a gap."""
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def read_all(
    directories: list[Path], noted: Mapping[Path, str] | None = None
) -> tuple[list[Group], list[str]]:
    """Return the groups, and a line about every run that is not finished.

    Args:
        noted: the line with which the run of a sweep's job failed, by its directory.

    Raises:
        StoreError: a run is damaged, or no run has a finished step.
    """
    outcomes = {each: outcome_of(each, (noted or {}).get(each)) for each in directories}
    started = [each for each in directories if (each / "steps" / "00" / STEP).exists()]
    left_out = [f"{each.name} ({outcomes[each]})" for each in directories if each not in started]
    if not started:
        which = ", ".join(left_out)
        raise StoreError(f"no step is finished of {which}; run the cu-run command first")
    grouped = group_runs([read_checked(directory) for directory in started])
    labels = label_groups(grouped)
    groups = [
        Group(
            number,
            labels[number],
            each,
            [] if each[0].complete else [outcomes[run.directory] for run in each],
        )
        for number, each in enumerate(grouped)
    ]
    lines = [
        f"{group.title}: {outcome} ({run.directory.name})"
        for group in groups
        for run, outcome in zip(group.runs, group.outcomes, strict=False)
    ]
    if left_out:
        lines.append(f"Left out, since no step is finished: {', '.join(left_out)}.")
    return groups, lines


def read_checked(directory: Path) -> RunRecord:
    """Read a run. Raises StoreError if it is damaged, or says other numbers than its files."""
    run = read_run(directory)
    sequence = run.config["sequence"]
    needed = NEEDED_MIXED if "domains" in sequence else NEEDED
    if missing := [name for name in needed if name not in sequence]:
        what = f"sequence has no {', '.join(missing)}; restore the file"
        raise StoreError(f"{run.directory}/config.yaml: {what}")
    require_true(run)
    return run


def group_runs(runs: list[RunRecord]) -> list[list[RunRecord]]:
    """Return the runs that differ in their seed alone together, by seed, in order of the first.

    A run joins no other of its own seed, nor one that was made by other code.
    """
    by_key: dict[str, list[list[RunRecord]]] = defaultdict(list)
    for run in runs:
        beside = by_key[json.dumps(all_but_the_seed(run), sort_keys=True, default=str)]
        for group in beside:
            if all(run.seed != other.seed and run.same_code_as(other) for other in group):
                group.append(run)
                break
        else:
            beside.append([run])
    place = {run.directory: number for number, run in enumerate(runs)}
    groups = [group for beside in by_key.values() for group in beside]
    groups.sort(key=lambda group: place[group[0].directory])
    return [sorted(group, key=lambda run: run.seed) for group in groups]


def all_but_the_seed(run: RunRecord) -> ConfigTree:
    """Return by name whatever decides the numbers of a run, and how far it is."""
    return settings_of(run) | {
        "regularizers": list(run.config["reg"]),
        "requests done": len(run.records) - 1,
        "weights of the model": run.records[0].model_sha256,
        "weights of the evaluator": run.records[0].evaluator_sha256,
        "what measures retention": run.records[0].retention_sha256,
        "measured by": "cu-eval" if run.is_evaluation else "cu-run",
        "text files of settings": texts_of(run),
    }


def settings_of(run: RunRecord) -> ConfigTree:
    """Return the settings of an experiment by dotted key, without the seed."""
    return leaves(without_paths(run.config, (*NOT_SCIENTIFIC, "seed")))


def texts_of(run: RunRecord) -> str:
    """Return "as they are now" of the text files that settings name, or the run's own signature.

    Where they have changed since, or are elsewhere, nothing tells whether two runs read the same.
    """
    made = run.records[0].signature
    return "as they are now" if made == signature(run.config) else f"others ({made[:8]})"


def leaves(value: ConfigTree, path: str = "") -> ConfigTree:
    """Return settings by dotted key. A list is one, and so is a mapping whose keys are no words."""
    found: ConfigTree = {}
    for key, entry in value.items():
        place = f"{path}.{key}" if path else str(key)
        if isinstance(entry, dict) and entry and all(WORDS.fullmatch(str(name)) for name in entry):
            found |= leaves(entry, place)
        elif entry != {}:
            found[place] = numbers_by_value(entry) if isinstance(entry, list | dict) else entry
    return found


def label_groups(groups: list[list[RunRecord]]) -> list[str]:
    """Return short unique names: method and regularizers, and what else is needed.

    That is the sequence and the seeds where they differ, then the signature, then a number.
    """
    labels = [runs[0].label for runs in groups]
    if len({runs[0].sequence for runs in groups}) > 1:
        labels = [f"{label}, {of[0].sequence}" for label, of in zip(labels, groups, strict=True)]
    seeds = [[run.seed for run in runs] for runs in groups]
    if any(each != seeds[0] for each in seeds):
        words = [f"seed{'s' if len(each) > 1 else ''} {in_words(each)}" for each in seeds]
        labels = [f"{label}, {word}" for label, word in zip(labels, words, strict=True)]
    signatures = [runs[0].records[0].signature[:4] for runs in groups]
    for details in (signatures, range(1, len(groups) + 1)):
        count = Counter(labels)
        labels = [
            f"{label} [{detail}]" if count[label] > 1 else label
            for label, detail in zip(labels, details, strict=True)
        ]
    return labels


def contrast(groups: list[Group]) -> dict[str, list[object]]:
    """Return in what groups are not all alike.

    Returns:
        By name, of a setting its dotted key, the value of each group; None where it has none.
    """
    known = [all_but_the_seed(group.first) | {"seeds": group.seeds} for group in groups]
    code = [", ".join(dict.fromkeys(each.sha256 for each in group.first.codes)) for group in groups]
    if any(not group.first.same_code_as(groups[0].first) for group in groups):
        known = [each | {"code": sha256} for each, sha256 in zip(known, code, strict=True)]
    keys = dict.fromkeys(key for each in known for key in each)
    rows = {key: [each.get(key) for each in known] for key in keys}
    return {
        key: values for key, values in rows.items() if any(value != values[0] for value in values)
    }
