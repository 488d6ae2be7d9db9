"""What does each regularizer keep alone, and what do the tuned combinations add? (Lee et al. 2026,
arXiv 2511.07970)

    python scripts/studies/ablation.py [OVERRIDE ...] [--output DIR]

ConAbl with every file of conf/reg, each with its settings of conf/tuned: the metrics after the last
request, and what RA-I and RA-C gain over the run without regularizer. A run of the sequence per
file; ablation.md has the seconds of each. The last request is needed alone: eval.every=last.
"""

import pandas as pd
from study import (
    Study,
    as_markdown,
    command,
    draw_bars,
    finished,
    last_rows,
    regularizers,
    with_stopped,
)


def cells() -> dict[str, list[str]]:
    return {name: [f"reg={name}"] for name in regularizers()}


def with_gains(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with the gains of RA-I and RA-C in points over its row "none".

    NaN without such a row.
    """
    plain = table.set_index("run").reindex(["none"]).iloc[0]
    return table.assign(
        RA_I_gain=table["RA_I"] - plain["RA_I"], RA_C_gain=table["RA_C"] - plain["RA_C"]
    )


def main(study: Study) -> None:
    runs = study.run(cells(), gaps=True)
    table = with_gains(last_rows({label: run.table for label, run in finished(runs).items()}))
    shown = with_stopped(table, runs)
    text = (
        "After the last request; a gain is in points over none, seconds are those of all "
        f"requests:\n\n{as_markdown(shown)}"
    )
    study.write(shown, draw_bars(table), text)


if __name__ == "__main__":
    command(main, __doc__)
