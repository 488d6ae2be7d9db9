"""What the studies share: command line, runs, the look of the pictures, what is written.

A study is `python scripts/studies/NAME.py [OVERRIDE ...] [--output DIR]`. The overrides are
appended to every run (eval.every=last too, where a study needs the last request alone and says
so), so that `experiment=unlearncanvas_style model.path=DIR
evaluator.paths.style=DIR evaluator.paths.object=DIR` gives it on Stable Diffusion. It writes
NAME.csv, NAME.png and NAME.md. What a person found in the numbers stands beside them in
NAME.finding.md, a paragraph of Markdown that no study writes; NAME.md carries it. Stopped and
started again it goes on where it was; finished runs are found again.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import yaml

from cu_runner.cli.console import Parser, quiet_libraries
from cu_runner.cli.failures import one_line_failures
from cu_runner.config.compose import compose
from cu_runner.config.run_config import RunConfig
from cu_runner.reporting.table_formats import to_markdown
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.errors import LaunchError
from cu_runner.store.records import name_requests
from cu_runner.store.run_record import RunRecord, read_run
from cu_runner.sweeps.make_runs import LAST, cu_runs

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = {"UA": "UA (%)", "RA_I": "RA-I (%)", "RA_C": "RA-C (%)", "drift_l2": "drift, L2 norm"}
OUTPUT = Path("docs/studies")
ALL_RUNS = (
    "All runs, after the last request; seconds are of all requests, beside what else the machine "
    "did:\n\n"
)
CANDIDATES = Path(__file__).parents[1] / "tune_shapecanvas.yaml"
STABLE_DIFFUSION = (
    "experiment=unlearncanvas_style model.path=DIR evaluator.paths.style=DIR "
    "evaluator.paths.object=DIR --output unlearncanvas"
)


def regularizers() -> list[str]:
    """Return the public names of conf/reg for a method that trains: none, those alone, then the
    combinations. rece goes with closed forms alone; recommended is another name for gate.
    """
    files = {path.stem for path in (config_dir() / "reg").glob("*.yaml")}
    names = sorted(files - {"rece", "recommended"})
    return sorted(names, key=lambda name: (name != "none", "_" in name))


def unsearched(study: "Study", cells: dict[str, list[str]]) -> list[str]:
    """Return the labels of runs on the embedded model whose settings were not searched on it.

    Those that were are in scripts/tune_shapecanvas.yaml. Of other models: none.
    """
    grid = yaml.safe_load(CANDIDATES.read_text(encoding="utf-8"))
    found = []
    for label, cell in cells.items():
        plan = study.plan(cell)
        path = str(plan.resolved["model"]["path"])
        if not path.startswith("package:"):
            continue
        words = {key: value for key, _, value in (word.partition("=") for word in study.job(cell))}
        name = f"{words.get('method', 'conabl')}+{words.get('reg', 'none')}"
        # none for mixed sequences; the transformer has candidates of its own
        domain = "flow" if path.endswith("/flow") else plan.resolved["sequence"].get("domain")
        keys = grid.get(domain, {})
        if not any(key == name or key.startswith(f"{name}+") for key in keys):
            found.append(label)
    return found


def remark_unsearched(study: "Study", cells: dict[str, list[str]]) -> str:
    """Return the paragraph of a page that names the runs of unsearched(); "" without one."""
    names = unsearched(study, cells)
    if not names:
        return ""
    return (
        f"Settings that were not searched on this model: {', '.join(names)}. What stands there "
        "says little about them.\n\n"
    )


@dataclass(frozen=True)
class Study:
    """One study as it was called.

    name: of its script. overrides: of the user, for every run. output: the folder to write to.
    own: words of the user that the study reads itself.
    """

    name: str
    about: str
    overrides: list[str]
    output: Path
    own: tuple[str, ...] = ()

    def take(self, key: str, default: list[str]) -> tuple[list[str], "Study"]:
        """Return the values of the user's KEY=A,B or KEY=[A,B], and the study without that word."""
        words = [word for word in self.overrides if word.partition("=")[0] == key]
        if not words:
            return default, self
        rest = [word for word in self.overrides if word not in words]
        values = words[-1].partition("=")[2].strip("[]").split(",")
        return values, replace(self, overrides=rest, own=(*self.own, *words))

    def gives(self, *keys: str) -> bool:
        """Whether the user set one of these."""
        return not {
            override.partition("=")[0].lstrip("+") for override in self.overrides
        }.isdisjoint(keys)

    def job(self, cell: list[str]) -> list[str]:
        """All overrides of a run."""
        return ["wandb.mode=disabled", *cell, *self.overrides]

    def plan(self, cell: list[str]) -> RunConfig:
        """Return the checked configuration of a run.

        Raises ValueError, or an error of Hydra's own.
        """
        return compose(self.job(cell))

    def check_own(self, cells: dict[str, list[str]]) -> None:
        """Raise ValueError if the user sets what the study sets itself in some of its cells."""
        own = {override.partition("=")[0] for cell in cells.values() for override in cell}
        for key in sorted(key.lstrip("+") for key in own):
            if self.gives(key):
                raise ValueError(
                    f"{key}: this study sets it itself; leave it out, or run cu-run with it"
                )

    def run(self, cells: dict[str, list[str]], *, gaps: bool = False) -> dict[str, RunRecord | str]:
        """Make, resume or find the runs, by label; of a run that diverged the line that says so.

        Args:
            cells: the study's own overrides of each run, by label. All are checked before the first
                one starts.
            gaps: whether the study needs the last request alone, so that the user may leave
                evaluations out with eval.every.

        Raises:
            ValueError: the user sets what the study sets itself. LaunchError: a run failed, or
                every run diverged.
        """
        self.check_own(cells)
        places = {label: self.plan(cell).directory for label, cell in cells.items()}
        if not gaps:
            refuse_gaps(places)
        jobs = {places[label]: self.job(cell) for label, cell in cells.items()}
        found = {}
        for place, run in zip(
            jobs, cu_runs(list(jobs.values()), evaluated=LAST if gaps else None), strict=True
        ):  # one job where two labels are the same run
            found[place] = run
            labels = ", ".join(label for label in cells if places[label] == place)
            print(
                f"{labels:<40} {run if isinstance(run, str) else summary_line(run.table)}",
                flush=True,
            )
        whole = [
            all(record.evaluated for record in run.records) for run in finished(found).values()
        ]
        if not all(whole) and not self.gives("eval.every"):
            print(
                f"{whole.count(False)} of the runs were not evaluated after every request (an "
                "earlier eval.every): curves have only what is there",
                flush=True,
            )
        if all(isinstance(run, str) for run in found.values()):
            raise LaunchError(f"every run diverged, the last with: {run}")
        return {label: found[place] for label, place in places.items()}

    def write(
        self,
        rows: pd.DataFrame,
        figure: Figure,
        text: str,
        on_stable_diffusion: str = STABLE_DIFFUSION,
    ) -> None:
        """Write the rows, the picture, and the text under the commands that made it and what a
        person found.

        Args:
            on_stable_diffusion: the overrides that give the study there.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        table, picture, page = (
            self.output / f"{self.name}.{kind}" for kind in ("csv", "png", "md")
        )
        rows.to_csv(table, index=False, float_format="%.6g")
        figure.savefig(picture, dpi=110)
        plt.close(figure)
        script, folder = (
            f"    python scripts/studies/{self.name}.py",
            [] if self.output == OUTPUT else ["--output", str(self.output)],
        )
        this = f"{script} {shlex.join([*self.own, *self.overrides, *folder])}".rstrip()
        commands = f"{this}\n{script} {on_stable_diffusion}  # on Stable Diffusion\n"
        image = f"![{self.about}]({picture.name})"
        finding = self.output / f"{self.name}.finding.md"
        found = f"{finding.read_text(encoding='utf-8').strip()}\n\n" if finding.is_file() else ""
        page.write_text(
            f"# {self.name}\n\n{self.about}\n\n{found}{commands}\n{image}\n\n{text}\n",
            encoding="utf-8",
        )
        if found:
            print(f"{finding} is in it: read whether it still holds")
        for path in (table, picture, page):
            print(f"wrote {path}")


def refuse_gaps(places: dict[str, Path]) -> None:
    """Raise ValueError if a finished run lacks evaluations, before any run begins."""
    for label, place in places.items():
        if not (place / "config.yaml").is_file():
            continue
        run = read_run(place)
        lacking = [step.index for step in run.records if not step.evaluated]
        if run.complete and lacking:
            raise ValueError(
                f"{label}: {place} did not evaluate {name_requests(lacking)} (an earlier "
                "eval.every), and every request is needed here; give another paths.outputs"
            )


def command(main: Callable[[Study], None], docstring: str) -> None:
    """Call a study with its command line.

    What a user can mend becomes one line on stderr and an exit status, as with cu-run.
    """
    question, _, more = docstring.partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=question, epilog=more, formatter_class=form)
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="as of cu-run, for every run of the study"
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help=f"folder to write to (default: {OUTPUT})"
    )
    given = parser.parse_intermixed_args()
    with one_line_failures(Path(sys.argv[0]).name):
        quiet_libraries()
        main(Study(Path(sys.argv[0]).stem, parser.description, given.overrides, given.output))


def summary_line(table: pd.DataFrame) -> str:
    """Say the metrics after the last request."""
    last = table.iloc[-1]
    return (
        f"UA {last.UA:5.1f}  RA-I {last.RA_I:5.1f}  RA-C {last.RA_C:5.1f}  drift "
        f"{last.drift_l2:.1f}"
    )


def first_targets(study: Study, number: int, *cell: str) -> list[str]:
    """Return the overrides that leave the first targets of a sequence, without the others' anchors.

    None where the user names the targets, or where there are no more.

    cell: what the study sets itself and the user's overrides need to compose.
    """
    targets = study.plan([*cell]).sequence.build().targets
    if study.gives("sequence.targets") or len(targets) <= number:
        return []
    anchors = [f"~sequence.anchors.{other.name}" for other in targets[number:] if other.anchor]
    return [f"sequence.targets={json.dumps([each.name for each in targets[:number]])}", *anchors]


# ------------------------------------------------------------ tables
def finished(runs: dict[str, RunRecord | str]) -> dict[str, RunRecord]:
    """Return the runs that reached their last request."""
    return {label: run for label, run in runs.items() if not isinstance(run, str)}


def with_stopped(table: pd.DataFrame, runs: dict[str, RunRecord | str]) -> pd.DataFrame:
    """Return the table, and a row for every run that diverged, with the reason.

    The row stands under the name of the first column.
    """
    reasons = {label: run for label, run in runs.items() if isinstance(run, str)}
    if not reasons:
        return table
    return pd.concat(
        [table, pd.DataFrame({table.columns[0]: list(reasons), "stopped": list(reasons.values())})]
    )


def last_rows(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per run: the metrics after its last request, and the seconds of all its requests
    (training and evaluation).
    """
    shown = ["UA", "RA_I", "RA_C", "RA_C_retained", "drift_l2"]
    rows = [
        {
            "run": label,
            **table[shown].iloc[-1],
            "seconds": table[["train_seconds", "eval_seconds"]].to_numpy().sum(),
        }
        for label, table in tables.items()
    ]
    return pd.DataFrame(rows)


def over_requests(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the metrics of every run after every request, one below the other."""
    shown = ["run", "request", "concept", *PANELS, "RA_C_retained", "UA_current", "UA_previous"]
    return pd.concat([table.assign(run=label) for label, table in tables.items()])[shown]


def as_markdown(table: pd.DataFrame, digits: int = 1) -> str:
    """Return a Markdown table; "-" for what was not measured."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.{digits}f}"
        return str(value)

    return to_markdown(
        [cell(value) for value in line] for line in (table.columns, *table.itertuples(index=False))
    )


# ------------------------------------------------------------ pictures
def panels(
    rows: int, columns: int, width: float = 3.3, height: float = 3.2
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a grid of axes, left to right and top to bottom.

    Width and height of each in inches.
    """
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, constrained_layout=True, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    return figure, list(axes.flat)


def plot_over_requests(
    axes: list[Axes], tables: dict[str, pd.DataFrame], styles: dict[str, str] | None = None
) -> None:
    """UA, RA-I, RA-C and drift over the requests into four axes, one line per run.

    styles: matplotlib's line format by label.
    """
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for label, table in tables.items():
            axis.plot(
                table["request"],
                table[name],
                (styles or {}).get(label, "o-"),
                markersize=3,
                label=label,
            )
        axis.set(xlabel="request", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if name != "drift_l2":
            axis.set_ylim(-3, 103)
    axes[0].legend(fontsize=7, loc="lower left")


def draw_bars(table: pd.DataFrame) -> Figure:
    """UA, RA-I, RA-C and drift after the last request, one bar per run."""
    figure, axes = panels(1, len(PANELS), height=0.8 + 0.24 * len(table))
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        axis.barh(
            table["run"],
            table[name],
            color="#1b9e77" if name != "drift_l2" else "#888888",
            height=0.7,
        )
        axis.set(title=title, yticks=range(len(table)))
        axis.invert_yaxis()
        if name != "drift_l2":
            axis.set_xlim(0, 103)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    return figure
