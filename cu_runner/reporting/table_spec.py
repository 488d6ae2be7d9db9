"""A file of scripts/tables, read and checked.

Rows and columns as overrides, and the published numbers with their source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from cu_runner.config.permissions import refuse_permissions
from cu_runner.evaluators.recovered import RECOVERED
from cu_runner.reporting.estimates import SHARES
from cu_runner.runtime.paths import shipped_dir
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.settings import STRICT
from cu_runner.schema.validate import validate
from cu_runner.schema.yaml_files import check_yaml

Overrides = list[str]


@checked_dataclass(frozen=True, config=STRICT)
class Experiment:
    """Which model a table is made on. methods and columns: label -> overrides."""

    model: str
    methods: dict[str, Overrides]
    columns: dict[str, Overrides]


@checked_dataclass(frozen=True, config=STRICT)
class Targets:
    """Published numbers.

    sources: short name -> where a number was read. values: method -> column -> row -> metric ->
    percent.
    """

    model: str
    tolerance: Annotated[float, Field(ge=0)]
    sources: dict[str, str]
    values: dict[str, dict[str, dict[str, dict[str, float | str]]]]

    def complaints(self, table: Table) -> Iterator[str]:
        """Yield what names no cell, metric or source, so that a published number would be lost."""
        methods = {name for experiment in table.experiments.values() for name in experiment.methods}
        for method, columns in self.values.items():
            places = [(method, methods), *((column, table.columns()) for column in columns)]
            places += [(row, set(table.rows)) for rows in columns.values() for row in rows]
            for name, allowed in places:
                if name not in allowed:
                    known = ", ".join(sorted(allowed))
                    yield f"targets.values: {name!r} is no part of this table; allowed: {known}"
            for row, published in (entry for rows in columns.values() for entry in rows.items()):
                for key, value in published.items():
                    if complaint := self._complaint_of(key, value, table):
                        yield f"targets.values: {row}: {complaint}"

    def _complaint_of(self, key: str, value: float | str, table: Table) -> str | None:
        """Return what is wrong with an entry of a published cell, or None."""
        if key == "source":
            known = [*self.sources, "none"]
            wrong = f"source {value!r} is not described; allowed: {', '.join(known)}"
            return None if value in known else wrong
        if key not in table.metrics:
            metrics = ", ".join(table.metrics)
            return f"{key!r} is no metric of this table; allowed: source, {metrics}"
        if isinstance(value, str) or not 0 <= value <= 100:
            return f"{key} is {value!r}; give a number of 0 to 100 (percent)"
        return None


@checked_dataclass(frozen=True, config=STRICT)
class Table:
    """A file of scripts/tables."""

    title: str
    metrics: list[str]
    rows: dict[str, Overrides | dict[str, Overrides]]
    experiments: dict[str, Experiment]
    targets: Targets | None = None
    notes: list[str] = Field(default_factory=list)

    def columns(self) -> set[str]:
        """Return the labels of the columns of all experiments."""
        return {column for experiment in self.experiments.values() for column in experiment.columns}

    def complaints(self) -> Iterator[str]:
        """Yield what is wrong with it though every type is right."""
        for metric in self.metrics:
            if metric not in SHARES and not RECOVERED.fullmatch(metric):
                known = ", ".join([*SHARES, "UA_worst", "recovered_PROBE"])
                yield f"metrics: {metric!r} is not a share of images; allowed: {known}"
        for kind in ("metrics", "rows", "experiments"):
            if not getattr(self, kind):
                yield f"{kind}: empty; a table needs one at least"
        for name, experiment in self.experiments.items():
            if not experiment.methods or not experiment.columns:
                what = "methods or columns are empty; a table needs one of each at least"
                yield f"experiments: {name}: {what}"
            if not re.fullmatch(r"[\w.-]+", name):
                what = "becomes part of a file's name; give letters, digits, '_', '-' and '.' only"
                yield f"experiments: {name!r} {what}"
        columns = self.columns()
        for label, overrides in self.rows.items():
            if isinstance(overrides, dict) and set(overrides) != columns:
                given, needed = ", ".join(overrides), ", ".join(sorted(columns))
                yield f"row {label!r} gives overrides for {given}; give them for {needed}"
        if self.targets:
            yield from self.targets.complaints(self)

        for place, text in self.texts():
            if not text.strip().isprintable():
                yield f"{place}: {text!r} would not be one line of print; give plain text"

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield every text that is printed, and where it stands."""
        yield "title", self.title
        yield from (("rows", label) for label in self.rows)
        for name, experiment in self.experiments.items():
            place = f"experiments: {name}"
            texts = (experiment.model, *experiment.methods, *experiment.columns)
            yield from ((place, text) for text in texts)
        if self.targets:
            texts = (self.targets.model, *self.targets.sources, *self.targets.sources.values())
            yield from (("targets", text) for text in texts)
        yield from (("notes", note) for note in self.notes)

    def overrides(self) -> Iterator[Overrides]:
        """Return every list of overrides that the file holds."""
        for row in self.rows.values():
            yield from row.values() if isinstance(row, dict) else [row]
        for experiment in self.experiments.values():
            yield from (*experiment.methods.values(), *experiment.columns.values())


def read_table(name: str) -> tuple[str, Table]:
    """Return a table and its short name: a shipped one, or a YAML file by path.

    Raises:
        ConfigError: it is not there, or wrong.
    """
    own = name.endswith((".yaml", ".yml"))
    path = Path(name) if own else shipped_dir("tables") / f"{name}.yaml"
    check_yaml(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(entry.stem for entry in shipped_dir("tables").glob("*.yaml")))
        what = f"no such table; allowed: {known}, or the path of a YAML file"
        raise ConfigError(f"{name}: {what}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    table = validate(Table, content, path.name, every=True)
    complaints = [f"{path.name}: {complaint}" for complaint in table.complaints()]
    for override in (override for overrides in table.overrides() for override in overrides):
        try:
            refuse_permissions([override], path.name)
        except ConfigError as error:
            complaints.append(str(error))
    if complaints:
        raise ConfigError("; ".join(dict.fromkeys(complaints)))
    return path.stem, table
