"""The matrix of methods and regularizers on the embedded model, its table and its picture.

`make results`.

    python scripts/results.py                  # resumes; writes docs/matrix.* and docs/results.*
    python scripts/results.py --alone esd uce  # conabl's rows, and these methods without projection
    python scripts/results.py --rows conabl+gradproj_l1 esd+none  # the others keep their figures

Every method alone and with gradient projection, and conabl with every regularizer and tuned
combination, each with the settings of conf/tuned. The rows of the picture are evaluated after every
request, the others after the first and the last: of these, images that are not finite are seen
there alone. Seconds are those of one thread, with as many runs side by side as there are cores.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pandas as pd

from cu_runner.reporting.table_formats import to_markdown
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.errors import LaunchError
from cu_runner.store.run_record import RunRecord
from cu_runner.sweeps.make_runs import cu_runs

mpl.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
PANELS = {"UA": "UA (%)", "RA_I": "RA-I (%)", "RA_C": "RA-C (%)", "drift_l2": "drift, L2 norm"}
COLUMNS = [
    "method",
    "reg",
    "remark",
    "UA",
    "RA_I",
    "RA_C",
    "drift_l2",
    "seconds",
    "first_UA",
    "first_RA_C",
]
# The curves of the picture: conabl with these regularizers.
CURVES = {
    "none": "#444444",
    "l1": "#a6761d",
    "l2": "#1f77b4",
    "selft": "#e7298a",
    "merge": "#7570b3",
    "gradproj": "#d95f02",
}
# The subspace as published: one column per name, the mean over its own tokens; 43 names, as many as
# leave the target room.
OWN_TOKENS = [
    "reg.gradproj.tokens=own",
    "reg.gradproj.energy=1.0",
    "reg.gradproj.contexts=['{concept}']",
]
OWN_TOKENS += ["reg.gradproj.auxiliary.number=43", "train.lr=3e-4"]
Name = tuple[str, str, str]  # of a row: method, regularizer, remark


def choices(group: str) -> list[str]:
    """Return the public names of a configuration group, conabl and none first."""
    names = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
    return sorted(names, key=lambda name: name not in ("conabl", "none"))


def matrix(methods: list[str], regularizers: tuple[str, ...]) -> dict[Name, list[str]]:
    """Return (method, reg, remark) -> overrides of its run.

    Conabl with everything, these methods with these regularizers.
    """
    others = ("rece", "recommended")  # of closed forms alone; another name of gate
    cells = {("conabl", reg, ""): [f"reg={reg}"] for reg in choices("reg") if reg not in others}
    cells["uce", "rece", ""] = ["method=uce", "reg=rece"]  # which erases what closed forms leave
    cells["conabl", "nullspace", "retained names in the kept prompts"] = [
        "reg=nullspace",
        "reg.nullspace.names.retained=true",
    ]
    cells["conabl", "gradproj", "own tokens only"] = ["reg=gradproj", *OWN_TOKENS]
    for reg in regularizers:
        cells |= {(method, reg, ""): [f"method={method}", f"reg={reg}"] for method in methods}
    return cells


def table_of(tables: dict[Name, pd.DataFrame | str]) -> pd.DataFrame:
    """One row per run: the metrics after the last request, and the training seconds of all.

    Or what stopped it.
    """
    rows = []
    for (method, reg, remark), table in tables.items():
        row = {"method": method, "reg": reg, "remark": remark}
        if isinstance(table, str):
            rows.append(row | {"stopped": table})
            continue
        row |= {
            "first_UA": table["UA"][1],
            "first_RA_C": table["RA_C"][1],
            "seconds": table["train_seconds"].sum(),
        }
        rows.append(row | table[["UA", "RA_I", "RA_C", "drift_l2"]].iloc[-1].to_dict())
    return pd.DataFrame(rows, columns=[*COLUMNS, "stopped"])


def summary(table: pd.DataFrame) -> str:
    last = table.iloc[-1]
    return f"UA {last.UA:5.1f}  RA-I {last.RA_I:5.1f}  RA-C {last.RA_C:5.1f}"


def keep_others(found: pd.DataFrame) -> pd.DataFrame:
    """Return the rows found, in place of the same ones of docs/matrix.csv, which keeps its order.

    New ones at the end.
    """
    known, key = (
        pd.read_csv(DOCS / "matrix.csv", dtype={"remark": str}).fillna({"remark": ""}),
        ["method", "reg", "remark"],
    )
    names = [frame[key].agg("+".join, axis=1) for frame in (known, found)]
    places = {name: place for place, name in enumerate(dict.fromkeys(pd.concat(names)))}
    kept = known[~names[0].isin(names[1])]
    rows, order = pd.concat([kept, found]), pd.concat([names[0][kept.index], names[1]]).map(places)
    return rows.iloc[order.argsort(kind="stable")].reset_index(drop=True)


def as_markdown(table: pd.DataFrame) -> str:
    """Return the table of all runs; of one that was stopped, the reason in place of its numbers."""
    numbers = ["UA", "RA-I", "RA-C", "drift", "training s", "UA / RA-C after request 1"]
    lines = [["method", "regularizer", *numbers]]
    for row in table.itertuples():
        name = [row.method, f"{row.reg}, {row.remark}" if row.remark else row.reg]
        if isinstance(row.stopped, str):
            lines.append([*name, row.stopped.removeprefix("cu-run: "), *[""] * (len(numbers) - 1)])
            continue
        tenths = [f"{value:.1f}" for value in (row.UA, row.RA_I, row.RA_C, row.drift_l2)]
        first = f"{row.first_UA:.0f} / {row.first_RA_C:.1f}"
        lines.append([*name, *tenths, f"{row.seconds:.0f}", first])
    return to_markdown(lines) + "\n"


def draw(tables: dict[str, pd.DataFrame]) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), constrained_layout=True)
    for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
        for reg, table in tables.items():
            shown = table[table["request"] > 0] if name == "UA" else table
            axis.plot(
                shown["request"],
                shown[name],
                marker="o",
                markersize=3,
                color=CURVES[reg],
                label=f"conabl, {reg}",
            )
        axis.set(xlabel="request", title=title, xticks=range(0, 13, 2))
        axis.grid(alpha=0.25)
        if name != "drift_l2":
            axis.set_ylim(-3, 103)
    axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(DOCS / "results.png", dpi=110)
    plt.close(figure)


def write(tables: dict[Name, pd.DataFrame | str], *, partly: bool) -> None:
    """Write the table of what is done so far, and the picture when its curves are there.

    partly: other rows keep their figures.
    """
    found = table_of(tables)
    if partly and (DOCS / "matrix.csv").is_file():
        found = keep_others(found)
    found.round(3).to_csv(DOCS / "matrix.csv", index=False)
    (DOCS / "matrix.md").write_text(as_markdown(found), encoding="utf-8")
    curves = {reg: tables["conabl", reg, ""] for reg in CURVES if ("conabl", reg, "") in tables}
    if len(curves) == len(CURVES):
        rows = pd.concat([table.assign(reg=reg) for reg, table in curves.items()])
        rows[["reg", "request", "concept", *PANELS, "RA_C_retained"]].to_csv(
            DOCS / "results.csv", index=False
        )
        draw(curves)


def made(cells: dict[Name, list[str]]) -> Iterator[tuple[Name, RunRecord | str]]:
    """Make the runs; yield each with its name, those of the picture first.

    Raises:
        LaunchError: a run failed, or a finished one lacks an evaluation.
    """
    drawn = {name: words for name, words in cells.items() if is_drawn(name)}
    others = {
        name: [*words, "eval.every=[1]"] for name, words in cells.items() if name not in drawn
    }
    for group, needed in ((drawn, None), (others, (1, -1))):
        jobs = [["wandb.mode=disabled", *words] for words in group.values()]
        yield from zip(group, cu_runs(jobs, evaluated=needed), strict=True)


def is_drawn(name: Name) -> bool:
    """Tell whether the picture shows a row's curve."""
    method, reg, remark = name
    return method == "conabl" and reg in CURVES and not remark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "methods", nargs="*", default=choices("method"), help="beside conabl; default: all"
    )
    parser.add_argument(
        "--alone", action="store_true", help="leave out the methods with gradient projection"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="METHOD+REG",
        help="only these rows; the others keep their figures",
    )
    arguments = parser.parse_args()
    cells = matrix(arguments.methods, ("none",) if arguments.alone else ("none", "gradproj"))
    if arguments.rows:
        named = {"+".join(filter(None, cell)): cell for cell in cells}
        if unknown := [row for row in arguments.rows if row not in named]:
            parser.error(f"{unknown[0]}: no such row; allowed: {', '.join(named)}")
        cells = {named[row]: cells[named[row]] for row in arguments.rows}
    tables = {}
    for cell, run in made(cells):
        tables[cell] = table = run if isinstance(run, str) else run.table
        print(
            (
                f"{'+'.join(filter(None, cell)):<40} "
                f"{table if isinstance(table, str) else summary(table)}"
            ),
            flush=True,
        )
        write({name: tables[name] for name in cells if name in tables}, partly=bool(arguments.rows))


if __name__ == "__main__":
    try:
        main()
    except LaunchError as problem:
        raise SystemExit(str(problem)) from None
