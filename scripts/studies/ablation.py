"""What does each regularizer keep alone, and what do the tuned combinations add? (Lee et al. 2026,
arXiv 2511.07970)

    python scripts/studies/ablation.py [seed=0,1,2] [OVERRIDE ...] [--output DIR]

ConAbl with every file of conf/reg, each with its settings of conf/tuned (minvar and gate bring
their own loss and steps): the metrics after the last request, and what RA-I and RA-C gain over the
run without regularizer. A run of the sequence per file and seed; ablation.md has the seconds of
each. The last request is needed alone: eval.every=last.
"""

from study import (
    ALL_RUNS,
    Study,
    as_markdown,
    command,
    draw_bars,
    finished,
    last_rows,
    regularizers,
    remark_unsearched,
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
)


def cells() -> dict[str, list[str]]:
    return {name: [f"reg={name}"] for name in regularizers()}


def main(study: Study) -> None:
    seeds, study = take_seeds(study)
    runs = study.run(with_seeds(cells(), seeds), gaps=True)
    tables = counted(finished(runs))
    last = last_with_intervals(curves(tables)).drop(columns="request")
    gains = differences(
        tables, {f"{name} - none": (name, "none") for name in cells() if name != "none"}
    )
    text = f"After the last request, means over seeds. {remark([*tables])}\n\n"
    text += f"{as_markdown(with_stopped(last, runs))}\n\n"
    text += remark_unsearched(study, cells())
    text += f"What each keeps beside none, in points:\n\n{as_markdown(gains)}\n\n"
    text += f"{remark_of_differences([*tables])}\n\n"
    rows = with_stopped(
        last_rows({label: run.table for label, run in finished(runs).items()}), runs
    )
    text += f"{ALL_RUNS}{as_markdown(rows)}"
    study.write(rows, draw_bars(last), text)


if __name__ == "__main__":
    command(main, __doc__)
