"""Run what the README's section "What the result shows" rests on, and draw its picture. `make results`.

python scripts/results.py          # resumes; writes docs/results.png, docs/results.csv and docs/results.md
"""

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pandas as pd

mpl.use("Agg")
import matplotlib.pyplot as plt

REGULARIZERS = {"none": "plain ConAbl", "l2": "L2", "gradproj": "gradient projection"}
COLOURS = {"none": "#444444", "l2": "#1f77b4", "gradproj": "#d95f02"}
PANELS = {"UA": "UA (%)", "RA_I": "RA-I (%)", "RA_C": "RA-C (%)", "drift_l2": "drift, L2 norm"}


def run(regularizer: str) -> pd.DataFrame:
    """metrics.csv of the run, made or resumed."""
    command = [str(Path(sys.executable).with_name("cu-run")), "method=conabl", f"reg={regularizer}"]
    print("$ " + " ".join(["cu-run", *command[1:]]), flush=True)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return pd.read_csv(Path(done.stdout.strip().splitlines()[-1].removeprefix("run: ")) / "metrics.csv")


def main() -> None:
    tables = {regularizer: run(regularizer) for regularizer in REGULARIZERS}
    docs = Path(__file__).parent.parent / "docs"
    docs.mkdir(exist_ok=True)
    rows = pd.concat([table.assign(reg=regularizer) for regularizer, table in tables.items()])
    rows[["reg", "request", "concept", *PANELS, "RA_C_retained"]].to_csv(docs / "results.csv", index=False)

    lines = ["| regularizer | UA | RA-I | RA-C | RA-C (retained) | drift |", "|---|---|---|---|---|---|"]
    for regularizer, table in tables.items():
        last = table.iloc[-1]
        numbers = " | ".join(f"{last[name]:.1f}" for name in ("UA", "RA_I", "RA_C", "RA_C_retained"))
        lines.append(f"| {REGULARIZERS[regularizer]} | {numbers} | {last['drift_l2']:.2f} |")
    (docs / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), constrained_layout=True)
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        for regularizer, table in tables.items():
            shown = table[table["request"] > 0] if name == "UA" else table
            axis.plot(
                shown["request"], shown[name], marker="o", markersize=3, color=COLOURS[regularizer], label=REGULARIZERS[regularizer]
            )
        axis.set(xlabel="request", title=label, xticks=range(0, 13, 2))
        axis.grid(alpha=0.25)
        if name != "drift_l2":
            axis.set_ylim(-3, 103)
    axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(docs / "results.png", dpi=110)


if __name__ == "__main__":
    main()
