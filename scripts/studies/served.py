"""What changes when every request is trained until its concepts are forgotten?

    python scripts/studies/served.py [seed=0,1,2] [OVERRIDE ...] [--output DIR]

The tuned settings have a fixed number of steps, chosen by UA after the last requests: nothing says
that the first concept is forgotten when its request is done. Here the same settings train a request
until UA over all concepts so far is 95, and no longer than four times those steps; of merging,
whose requests begin at the untouched model, UA of the one concept before it is merged. Of one
concept with 16 images or fewer that is all of them. Both ends beside each other, after the last
request. UA that ends training comes from the images that judge the run: these runs are tuned on
the judge, as the paper's merging is. Two runs of the sequence per regularizer and seed; served.md
has the seconds of each. The last request is needed alone, for all but UA of the fixed requests:
eval.every=last.
"""

import pandas as pd
from matplotlib.figure import Figure
from study import (
    ALL_RUNS,
    PANELS,
    Study,
    as_markdown,
    command,
    finished,
    last_rows,
    panels,
    with_stopped,
)
from study_seeds import (
    counted,
    curves,
    differences,
    last_with_intervals,
    remark,
    remark_of_differences,
    take_seeds,
    with_seeds,
    without_seed,
)

from cu_runner.store.run_record import RunRecord

REGULARIZERS = ("none", "l2", "selft", "merge", "gradproj")
ENDS = ("fixed", "forgotten")
FORGOTTEN = 95.0  # UA that ends a request
LONGEST = 4  # times the tuned number of steps, at which it ends all the same
CHECKS = 2  # of UA in the tuned number of steps


def cells(study: Study) -> dict[str, list[str]]:
    """Labels are "REG, END"."""
    found = {}
    for reg in REGULARIZERS:
        interval = study.plan([f"reg={reg}"]).spine.train.steps // CHECKS or 1
        found[f"{reg}, fixed"] = [f"reg={reg}"]
        found[f"{reg}, forgotten"] = [
            *(f"reg={reg}", f"++setting.stop_at={FORGOTTEN}"),
            *(f"setting.interval={interval}", f"train.steps={LONGEST * CHECKS * interval}"),
        ]
    return found


def requests_of(runs: dict[str, RunRecord]) -> pd.DataFrame:
    """Return one row per run and request: its steps, and UA when it ended.

    That is the UA that ended training (of merging before the merge), or without one that of the
    evaluation; NaN where neither was measured.
    """
    rows = []
    for label, run in runs.items():
        evaluated = run.table.set_index("request")["UA"]
        for record in run.records[1:]:
            checks = record.training.early_stop
            ua = checks[-1]["UA"] if checks else evaluated.get(record.index, float("nan"))
            row = {"run": label, "request": record.index, "steps": record.training.steps}
            rows.append(row | {"UA": float(ua)})
    return pd.DataFrame(rows)


def what_it_took(requests: pd.DataFrame) -> pd.DataFrame:
    """Return by run what requests_of() says: means over requests and seeds, and their number.

    forgotten: the share of requests (percent) that ended at a UA of FORGOTTEN or more. first UA: of
    the first request. Both NaN where a UA is unknown. At the end the steps of every request.
    """
    rows = []
    requests = requests.assign(run=requests["run"].map(without_seed))
    for run, table in requests.groupby("run", sort=False):
        first = table[table["request"] == 1]
        known = table["UA"].notna().all()
        share = 100.0 * (table["UA"] >= FORGOTTEN).mean() if known else float("nan")
        row = {"run": run, "seeds": len(first), "forgotten": share}
        row |= {"first UA": first["UA"].mean(skipna=False), "steps": table["steps"].mean()}
        each = table.groupby("request")["steps"].mean()
        rows.append(row | {f"{request}": each[request] for request in each.index})
    return pd.DataFrame(rows)


def draw(last: pd.DataFrame, requests: pd.DataFrame) -> Figure:
    """Draw steps over the requests, and the metrics at the end as pairs."""
    figure, axes = panels(1, 1 + len(PANELS))
    for place, reg in enumerate(REGULARIZERS):
        colour = f"C{place}"
        taken = requests[requests["run"].map(without_seed) == f"{reg}, forgotten"]
        mean = taken.groupby("request")["steps"].mean()
        axes[0].plot(mean.index, mean, "o-", markersize=3, color=colour, label=reg)
        for axis, metric in zip(axes[1:], PANELS, strict=True):
            pair = last.set_index("run")[metric].reindex([f"{reg}, {end}" for end in ENDS])
            axis.plot(range(len(ENDS)), pair, "o-", color=colour, label=reg)
    axes[0].set(xlabel="request", title="steps until forgotten", ylim=(0, None))
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    for axis, (metric, title) in zip(axes[1:], PANELS.items(), strict=True):
        axis.set(title=title, xticks=range(len(ENDS)), xlim=(-0.3, len(ENDS) - 0.7))
        axis.set_xticklabels(ENDS)
        axis.set_ylim((-3, 103) if metric != "drift_l2" else (0, None))
    axes[1].legend(fontsize=7, loc="lower left")
    return figure


def main(study: Study) -> None:
    seeds, study = take_seeds(study)
    runs = study.run(with_seeds(cells(study), seeds), gaps=True)
    done = finished(runs)
    tables = counted(done)
    last = last_with_intervals(curves(tables)).drop(columns="request")
    requests = requests_of(done)
    pairs = {
        f"{reg}: forgotten - fixed": (f"{reg}, forgotten", f"{reg}, fixed") for reg in REGULARIZERS
    }
    text = f"After the last request, means over seeds. {remark([*tables])}\n\n"
    text += f"{as_markdown(last)}\n\nWhat the other end changes, in points:\n\n"
    text += f"{as_markdown(differences(tables, pairs))}\n\n{remark_of_differences([*tables])}\n\n"
    text += (
        f"The share of requests (%) that ended at a UA of {FORGOTTEN:g} or more, UA of the first "
        "(where training was ended by UA, that one: of merging of the concept alone, before the "
        "merge), and steps: the mean, and of every request:\n\n"
        f"{as_markdown(what_it_took(requests))}"
    )
    rows = with_stopped(last_rows({label: run.table for label, run in done.items()}), runs)
    study.write(rows, draw(last, requests), f"{text}\n\n{ALL_RUNS}{as_markdown(rows)}")


if __name__ == "__main__":
    command(main, __doc__)
