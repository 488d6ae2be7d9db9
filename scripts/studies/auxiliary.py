"""Do number, threshold and source of the auxiliary concepts of gradient projection matter, and
whether they name the retained ones?

    python scripts/studies/auxiliary.py [OVERRIDE ...] [--output DIR]

One setting at a time is changed from those of conf/tuned: the number of names (the nearest to the
target), their source (random ones from a file, and, where the text encoder knows their words, a
list of painting styles and a list of objects), whether retained names may be among them, and the
threshold of duplicates. That is read with the names' own tokens only; where conf/tuned takes
others, its runs have further settings, which auxiliary.md names. One seed; 8 runs of the sequence,
10 on Stable Diffusion; auxiliary.md has the seconds of each. The last request is needed alone:
eval.every=last.
"""

import json
import random
from pathlib import Path

import pandas as pd
from study import Study, as_markdown, command, draw_bars, finished, last_rows, with_stopped

from cu_runner.request.name_sources import normalized, read_listed
from cu_runner.store.run_record import RunRecord

NUMBERS = (10, 50)
RANDOM = 25  # names in the file, or as many as there are
THRESHOLDS = (0.3, 0.7, 0.95)
# of the embedded model no two names have a cosine of own tokens beyond 0.56
THRESHOLDS_OF_EMBEDDED = (0.3, 0.4, 0.95)
LISTS = ("painting_styles", "common_objects")
# The published subspace of names: one column per name.
OWN = [
    "reg.gradproj.tokens=own",
    "reg.gradproj.energy=1.0",
    "reg.gradproj.contexts=['{concept}']",
]


def own_tokens(study: Study) -> list[str]:
    """Return what the runs that read names by their own tokens change beside the threshold.

    With the tuned projection of all tokens a larger step size goes; theirs is that of plain
    unlearning.
    """
    tokens = study.plan(["reg=gradproj"]).resolved["reg"]["gradproj"]["tokens"]
    if tokens == "own":
        return []
    if tokens == "last":  # names in place of captions
        return [*OWN, "reg.gradproj.auxiliary.name=auxiliary_styles"]
    plain = study.plan(["reg=none"]).spine.train
    return [*OWN, f"train.lr={plain.lr}", f"train.steps={plain.steps}"]


def is_embedded(study: Study) -> bool:
    """Whether the model is one of the package, which knows few words."""
    return str(study.plan([]).resolved["model"]["path"]).startswith("package:")


def cells(study: Study, random_names: Path) -> dict[str, list[str]]:
    own, embedded = own_tokens(study), is_embedded(study)
    source = "reg.gradproj.auxiliary.source"
    changes = {"as tuned": []}
    changes |= {
        f"number {number}": [f"reg.gradproj.auxiliary.number={number}"] for number in NUMBERS
    }
    drawn = len(random_names.read_text(encoding="utf-8").splitlines())
    changes[f"file, {drawn} at random"] = [
        f"{source}=file",
        f"reg.gradproj.auxiliary.name={json.dumps(str(random_names))}",
    ]
    changes |= {
        f"list {name}": [f"{source}=list", f"reg.gradproj.auxiliary.name={name}"]
        for name in (() if embedded else LISTS)
    }
    changes["with retained names"] = ["reg.gradproj.auxiliary.retained=true"]
    changes |= {
        f"own tokens, threshold {value}": [*own, f"reg.gradproj.threshold={value}"]
        for value in (THRESHOLDS_OF_EMBEDDED if embedded else THRESHOLDS)
    }
    return {label: ["reg=gradproj", *change] for label, change in changes.items()}


def draw_names(candidates: list[str], shut: list[str], number: int) -> list[str]:
    """At most so many of the candidates, at random with a fixed seed, none of them shut out."""
    closed = {normalized(name) for name in shut}
    free = [name for name in candidates if normalized(name) not in closed]
    return random.Random(0).sample(free, min(number, len(free)))


def subspaces(runs: dict[str, RunRecord]) -> pd.DataFrame:
    """Return what the projection held, means over the requests.

    That is names, directions, and the fraction of the target outside of them.
    """
    rows = []
    for label, run in runs.items():
        notes = pd.DataFrame(
            [record.training.regularizers["gradproj"] for record in run.records[1:]]
        )
        row = {
            "run": label,
            "names": notes["auxiliary"].map(len).mean(),
            "rank": notes["rank"].mean(),
        }
        rows.append(row | {"target_outside": notes["target_outside_subspace"].mean()})
    return pd.DataFrame(rows, columns=["run", "names", "rank", "target_outside"])


def main(study: Study) -> None:
    plan = study.plan(["reg=gradproj"])
    sequence, auxiliary = plan.sequence.build(), plan.resolved["reg"]["gradproj"]["auxiliary"]
    listed = auxiliary["source"] in ("list", "file")
    candidates = (
        read_listed(auxiliary["source"], auxiliary["name"]) if listed else list(sequence.vocabulary)
    )
    shut = [concept.name for concept in (*sequence.targets, *sequence.retain)]
    study.output.mkdir(parents=True, exist_ok=True)
    random_names = study.output / "auxiliary_random.txt"
    random_names.write_text(
        "\n".join(draw_names(candidates, shut, RANDOM)) + "\n", encoding="utf-8"
    )
    print(f"wrote {random_names}")
    runs = study.run(cells(study, random_names), gaps=True)
    done = finished(runs)
    table = subspaces(done).merge(
        last_rows({label: run.table for label, run in done.items()}), on="run"
    )
    shown = with_stopped(table, runs)
    text = (
        "After the last request, one seed. Means over the requests: names (earlier targets "
        "included, duplicates not), rank (directions\nof the subspace), target_outside (fraction "
        f"of the target's vector that it leaves free).\n\n{as_markdown(shown, 2)}"
    )
    if own := own_tokens(study):
        text += f"\n\nThe runs with own tokens have `{' '.join(own)}` too."
    study.write(shown, draw_bars(table), text)


if __name__ == "__main__":
    command(main, __doc__)
