"""What the same prompts and the same noise draw, before unlearning and after it.

    python scripts/samples.py RUN [RUN ...] [--output FILE.png]

Runs of one sequence and one model. A row of pictures for the untouched model and one for each run
after its last request; columns are concepts that were unlearned, then concepts that were to stay,
spread over the sequence, each in one of its evaluation prompts. Beside a row stand the run's UA,
RA-I and RA-C. The default file is docs/samples.png.
"""

import argparse
from pathlib import Path

import matplotlib as mpl

from cu_runner import read_run
from cu_runner.api.runs import RunRecord
from cu_runner.concepts.sequence import Concept, ImagePrompt, Sequence
from cu_runner.config.run_config import check_run
from cu_runner.schema.errors import StoreError

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

OUTPUT = Path(__file__).parent.parent / "docs/samples.png"
SHOWN = 5  # concepts of each kind


def spread(concepts: tuple[Concept, ...]) -> list[Concept]:
    """Return at most SHOWN concepts, evenly over the list, the first and the last among them."""
    if len(concepts) <= SHOWN:
        return list(concepts)
    return [concepts[round(n * (len(concepts) - 1) / (SHOWN - 1))] for n in range(SHOWN)]


def pictured(sequence: Sequence, concepts: tuple[Concept, ...]) -> list[ImagePrompt]:
    """Return an evaluation image of each of some concepts, spread over those that it has."""
    images = [sequence.evaluation_images([concept]) for concept in spread(concepts)]
    return [each[place * len(each) // len(images)] for place, each in enumerate(images)]


def require_alike(runs: list[RunRecord]) -> None:
    """Raise ValueError for a run that is not finished, or of another sequence or model."""
    for run in runs:
        if not run.complete:
            raise ValueError(f"{run.directory}: is not finished; the command that made it goes on")
        for key in ("sequence", "model"):
            if run.config[key] != runs[0].config[key]:
                raise ValueError(f"{run.directory}: has another {key} than {runs[0].directory}")


def label(run: RunRecord) -> str:
    last = run.table.iloc[-1]
    names = " ".join(run.config["reg"])
    shown = " / ".join(f"{last[metric]:.0f}" for metric in ("UA", "RA_I", "RA_C"))
    return f"{run.method}, {names or 'none'}\n{shown}"


def draw(rows: dict[str, list[Image.Image]], unlearned: list[str], kept: list[str]) -> Figure:
    """Return the figure: a row of pictures per label, those of what was unlearned first."""
    names = [*unlearned, *kept]
    figure, axes = plt.subplots(
        len(rows),
        len(names),
        figsize=(1.15 * len(names) + 1.9, 1.1 * len(rows) + 0.7),
        squeeze=False,
        layout="constrained",
    )
    for line, (text, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    for place, (axis, name) in enumerate(zip(axes[0], names, strict=True)):
        axis.set_title(name, fontsize=8, color="#c00000" if place < len(unlearned) else "black")
    figure.suptitle("red: unlearned; black: to stay. Beside a row UA / RA-I / RA-C", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    try:
        runs = [read_run(path) for path in arguments.runs]
        require_alike(runs)
    except (StoreError, ValueError) as problem:
        parser.error(str(problem))
    first = check_run(runs[0].config, runs[0].method)
    sequence = first.sequence.build()
    unlearned, kept = (pictured(sequence, group) for group in (sequence.targets, sequence.retain))
    prompts, seeds = zip(*((each.prompt, each.seed) for each in (*unlearned, *kept)), strict=True)

    def drawn(run: RunRecord, step: int) -> list[Image.Image]:
        return run.model(step=step).generate(list(prompts), list(seeds), progress=False)

    rows = {"untouched model": drawn(runs[0], 0)}
    for run in runs:
        rows[label(run)] = drawn(run, len(run.records) - 1)
    names = ([each.concept for each in group] for group in (unlearned, kept))
    draw(rows, *names).savefig(arguments.output, dpi=80)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
