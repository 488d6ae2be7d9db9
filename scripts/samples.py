"""What the same prompts and the same noise draw, before unlearning and after it.

    python scripts/samples.py RUN [RUN ...] --output FILE.png

Runs of one sequence and one model. A row of pictures for the untouched model and one for each run
after its last request; columns are concepts that were unlearned, then concepts that were to stay,
spread over the sequence, each in one of its evaluation prompts. Beside a row stand the run's UA,
RA-I and RA-C. docs/samples.png is conabl with reg=none, l2, gradproj and gate, seed 0.
"""

import argparse
from pathlib import Path

import matplotlib as mpl

from cu_runner import read_run
from cu_runner.api.model import Model
from cu_runner.api.runs import RunRecord
from cu_runner.concepts.sequence import Concept, ImagePrompt, Sequence
from cu_runner.config.revise import filled_in
from cu_runner.config.run_config import RunConfig, check_run
from cu_runner.schema.errors import StoreError, first_line
from cu_runner.schema.values import without_paths
from cu_runner.store.signature import NOT_SCIENTIFIC

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

METRICS = ("UA", "RA_I", "RA_C")
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
    """Raise ValueError for runs that do not belong into one picture.

    One that is not finished, that has not unlearned all targets at its end (setting=independent),
    or that is of another sequence, model or way of drawing than the first.
    """
    for run in runs:
        if not run.complete:
            raise ValueError(f"{run.directory}: is not finished; the command that made it goes on")
        names = [target.name for target in plan_of(run).sequence.build().targets]
        if sorted(run.unlearned(len(run.records) - 1)) != sorted(names):
            raise ValueError(f"{run.directory}: its last weights have not unlearned all targets")
        for key in ("sequence", "model", "eval"):
            own, first = (
                without_paths(each.config, NOT_SCIENTIFIC)[key] for each in (run, runs[0])
            )
            if own != first:
                raise ValueError(f"{run.directory}: has another {key} than {runs[0].directory}")


def plan_of(run: RunRecord) -> RunConfig:
    return check_run(filled_in(run.config), run.method)


def labels(runs: list[RunRecord]) -> list[str]:
    """Return what each run is, and its metrics: setting and seed too where runs differ in them."""
    told = [
        {"setting": plan_of(run).setting.plan, "seed": f"seed {run.config['seed']}"} for run in runs
    ]
    found = []
    for run, each in zip(runs, told, strict=True):
        differs = [key for key in each if len({other[key] for other in told}) > 1]
        name = ", ".join([run.method, "+".join(run.config["reg"]) or "none"])
        numbers = " / ".join(f"{run.table.iloc[-1][metric]:.1f}" for metric in METRICS)
        found.append("\n".join([name, *(each[key] for key in differs), numbers]))
    return found


def draw(
    rows: list[tuple[str, list[Image.Image]]], unlearned: list[str], kept: list[str]
) -> Figure:
    """Return the figure: a row of pictures per label, those of what was unlearned first."""
    names = [*unlearned, *kept]
    figure, axes = plt.subplots(
        len(rows),
        len(names),
        figsize=(1.15 * len(names) + 1.9, 1.1 * len(rows) + 0.7),
        squeeze=False,
        layout="constrained",
    )
    for line, (text, pictures) in zip(axes, rows, strict=True):
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
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    arguments = parser.parse_args()
    runs = [read_run(path) for path in arguments.runs]
    require_alike(runs)
    plan = plan_of(runs[0])
    sequence, sampler = plan.sequence.build(), plan.spine.eval
    unlearned, kept = (pictured(sequence, group) for group in (sequence.targets, sequence.retain))
    prompts, seeds = zip(*((each.prompt, each.seed) for each in (*unlearned, *kept)), strict=True)

    def drawn(model: Model) -> list[Image.Image]:
        return model.generate(
            list(prompts),
            list(seeds),
            steps=sampler.steps,
            guidance=sampler.guidance,
            scheduler=sampler.scheduler,
            progress=False,
        )

    rows = []
    for name, run in zip(labels(runs), runs, strict=True):
        model = run.model()
        rows = rows or [("untouched model", drawn(model.untouched))]
        rows.append((name, drawn(model)))
    names = ([each.concept for each in group] for group in (unlearned, kept))
    draw(rows, *names).savefig(arguments.output, dpi=80)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except (StoreError, ValueError, OSError) as problem:
        raise SystemExit(f"samples.py: {first_line(problem)}") from None
