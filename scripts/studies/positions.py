"""Which positions of a prompt carry a concept, and at which can it be told apart from others?

    python scripts/studies/positions.py [sequence=A,B] [OVERRIDE ...] [--output DIR]

Two questions that a method with a direction of its own (reg=minvar) must not confuse. Carried: the
text states of some positions of a concept's evaluation prompt are replaced by those that another
target's prompt has there, the untouched model draws the image, and the evaluator names what it
shows: the concept, the donor, or neither. The donor has as many tokens as the concept. Told apart:
the minimum-variance direction of those positions' state, and (d^T t)^2 against what it hears of
everything else, for each name. Nothing is trained. Styles and objects unless sequences are given.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import pandas as pd
import torch
from matplotlib.figure import Figure
from study import Study, as_markdown, command, panels
from torch import Tensor

from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.config.run_config import RunConfig
from cu_runner.evaluators.base import Evaluator
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.sampling import generate
from cu_runner.models.text import Text
from cu_runner.regularizers.minvar import minimum_variance_direction
from cu_runner.reporting.intervals import over_images

SEQUENCES = ["shapecanvas_style", "shapecanvas_object"]
GROUPS = ("begin", "before", "first token", "other tokens", "after", "end and padding", "all")
RIDGE = 0.1  # of the directions, in units of |t|^2
STABLE_DIFFUSION = (
    "experiment=unlearncanvas_style sequence=unlearncanvas_style,unlearncanvas_object "
    "model.path=DIR evaluator.paths.style=DIR evaluator.paths.object=DIR --output unlearncanvas"
)


def groups_of(model: DiffusionModel, name: str, prompt: str) -> dict[str, list[int]]:
    """Return the positions of a prompt by group; those that it lacks are left out."""
    span = model.token_span(name, prompt)
    end = min(len(model.tokenizer(prompt).input_ids), model.num_tokens) - 1
    found = {
        "begin": range(1),
        "before": range(1, span.start),
        "first token": range(span.start, span.start + 1),
        "other tokens": range(span.start + 1, span.stop),
        "after": range(span.stop, end),
        "end and padding": range(end, model.num_tokens),
        "all": range(model.num_tokens),
    }
    return {group: list(places) for group, places in found.items() if places}


def num_tokens(model: DiffusionModel, name: str) -> int:
    """Return how many tokens a name has."""
    return len(model.tokenizer(name).input_ids) - 2


def donors(model: DiffusionModel, targets: tuple[Concept, ...]) -> dict[str, Concept]:
    """Return, by name, for each target the next one with as many tokens, where there is one."""
    found = {}
    for place, concept in enumerate(targets):
        others = [*targets[place + 1 :], *targets[:place]]
        alike = num_tokens(model, concept.prompt_name)
        donor = next(
            (each for each in others if num_tokens(model, each.prompt_name) == alike), None
        )
        if donor is not None:
            found[concept.name] = donor
    return found


def patched(own: Tensor, other: Tensor, places: list[int]) -> Tensor:
    """Return the states own [L, D] with those of other [L, D] at some places."""
    mixed = own.clone()
    mixed[places] = other[places]
    return mixed


@contextlib.contextmanager
def saying(model: DiffusionModel, texts: dict[str, Text]) -> Iterator[None]:
    """Let the model read other texts for some prompts; their noise stays that of the prompts."""
    encode = model.encode_prompts

    def changed(prompts: list[str]) -> Text:
        return Text.cat(
            [texts[prompt] if prompt in texts else encode([prompt]) for prompt in prompts]
        )

    with mock.patch.object(model, "encode_prompts", changed):
        yield


def carried(
    plan: RunConfig, model: DiffusionModel, evaluator: Evaluator, sequence: Sequence
) -> Iterator[dict[str, object]]:
    """Yield what the images with patched positions show: one row an image, group by group."""
    replaced = donors(model, sequence.targets)
    targets = [concept for concept in sequence.targets if concept.name in replaced]
    for group in GROUPS:
        texts: dict[str, Text] = {}
        shown = []
        for image in sequence.evaluation_images(targets):
            places = groups_of(model, image.concept, image.prompt).get(group)
            if places is not None:
                donor = replaced[image.concept]
                cross = Concept(image.cross, sequence.cross_domain)
                both = [image.prompt, sequence.evaluation_prompt(donor, cross)]
                text = model.encode_prompts(both)
                mixed = patched(*text.hidden, places)
                texts[image.prompt] = dataclasses.replace(text[:1], hidden=mixed[None])
                shown.append((image, donor.name))
        with saying(model, texts):
            batches = generate(
                model,
                [image.prompt for image, _ in shown],
                [image.seed for image, _ in shown],
                plan.spine.eval,
                batch_size=plan.spine.eval.batch_size,
                label=f"{sequence.domain}, {group}",
                transform=evaluator.predict,
            )
            labels = [
                pair
                for of in batches
                for pair in zip(
                    of[sequence.domain].labels, of[sequence.cross_domain].labels, strict=True
                )
            ]
        for (image, donor_name), (label, cross_label) in zip(shown, labels, strict=True):
            yield {
                "group": group,
                "own": label == image.concept,
                "donor": label == donor_name,
                "cross kept": cross_label == image.cross,
            }


def told_apart(model: DiffusionModel, sequence: Sequence, group: str) -> list[float]:
    """Return (d^T t)^2 against the mean over names of what d hears of the rest, for each target.

    t is the mean state of the group's positions; the rest is that of every other name, and all
    other positions of all prompts. Targets without such positions are left out.
    """
    names = [concept.prompt_name for concept in (*sequence.targets, *sequence.retain)]
    states, around = {}, []
    for name in names:
        prompts = sequence.prompts_naming(name)
        hidden = model.encode_prompts(prompts).hidden.double()
        places = [groups_of(model, name, prompt).get(group) for prompt in prompts]
        if None in places:
            continue
        states[name] = torch.stack(
            [row[own].mean(0) for row, own in zip(hidden, places, strict=True)]
        )
        rest = [
            row[[place for place in range(len(row)) if place not in own]]
            for row, own in zip(hidden, places, strict=True)
        ]
        others = torch.cat(rest)
        around.append(others.T @ others / max(len(others), 1))
    squares = {name: rows.T @ rows / len(rows) for name, rows in states.items()}
    found = []
    for concept in sequence.targets:
        if concept.prompt_name not in states or len(states) < 2:
            continue
        t = states[concept.prompt_name].mean(0)
        kept = sum(squares.values()) - squares[concept.prompt_name] + sum(around)
        d = minimum_variance_direction(t, kept, RIDGE * t.square().sum().item())
        found.append(len(states) / (d @ kept @ d).item())
    return found


def table_of(plan: RunConfig, model: DiffusionModel) -> pd.DataFrame:
    """Return a row for each group of a sequence."""
    sequence, evaluator = plan.sequence.build(), plan.evaluator.build(device=str(model.device))
    images = pd.DataFrame(carried(plan, model, evaluator, sequence))
    rows = []
    for group in GROUPS:
        shown = images[images["group"] == group]
        if shown.empty:
            continue
        row: dict[str, object] = {
            "sequence": sequence.name,
            "positions": group,
            "images": len(shown),
        }
        for measure in ("own", "donor", "cross kept"):
            percent = 100 * shown[measure].mean()
            low, high = over_images(percent, len(shown))
            row |= {measure: percent, f"{measure} from": low, f"{measure} to": high}
        apart = told_apart(model, sequence, group) if group != "all" else []
        row["told apart"] = float(pd.Series(apart, dtype=float).median())
        rows.append(row)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Per sequence: the share of images that show the concept and the donor, and how well the
    position tells them apart.
    """
    names = list(table["sequence"].unique())
    figure, axes = panels(len(names), 2, width=4.0)
    for row, name in enumerate(names):
        shown = table[table["sequence"] == name]
        places = range(len(shown))
        left, right = axes[2 * row : 2 * row + 2]
        for shift, (measure, colour) in enumerate((("own", "#888888"), ("donor", "#d95f02"))):
            at = [place + 0.3 * shift - 0.15 for place in places]
            left.barh(at, shown[measure], height=0.3, color=colour, label=f"shows {measure}")
            left.hlines(at, shown[f"{measure} from"], shown[f"{measure} to"], color="black", lw=1)
        right.barh(places, shown["told apart"], color="#1b9e77")
        right.set(xscale="log", title=f"{name}: told apart, energy")
        left.set(title=f"{name}: images (%)", xlim=(0, 103))
        for axis, labels in ((left, shown["positions"]), (right, [""] * len(shown))):
            axis.set_yticks(places, labels)
            axis.invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    return figure


def main(study: Study) -> None:
    sequences, study = study.take("sequence", SEQUENCES)
    plans = [study.plan([f"sequence={name}"]) for name in sequences]
    model = plans[0].model.build(device="cpu")
    table = pd.concat([table_of(plan, model) for plan in plans], ignore_index=True)
    shown = table[["sequence", "positions", "images", "own", "donor", "cross kept", "told apart"]]
    page = (
        "Of images in which the states of these positions come from the donor's prompt: how many "
        "show the concept of the prompt (own), the donor, and still the right one of the other "
        "domain (cross kept), percent;\nand the median over targets of (d^T t)^2 against d^T C d "
        f"for each name:\n\n{as_markdown(shown)}\n\nIntervals over images are in {study.name}.csv. "
        '"all" replaces the whole prompt: the donor\'s own accuracy.'
    )
    study.write(table, draw(table), page, STABLE_DIFFUSION)


if __name__ == "__main__":
    command(main, __doc__)
