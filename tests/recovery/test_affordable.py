"""recovery=cheap draws a quarter of the evaluation's images at most, whatever the sequence."""

import dataclasses

import pytest

from cu_runner.config.compose import compose
from cu_runner.recovery.affordable import SHARE, affordable
from cu_runner.recovery.base import Cost
from cu_runner.recovery.completion import Completion
from cu_runner.recovery.paraphrase import Paraphrase
from cu_runner.runner.forecast import probes_left, work_of


@pytest.mark.parametrize(
    ("sequence", "every"),
    [
        ("shapecanvas_style", 1),
        ("shapecanvas_object", 1),
        ("shapecanvas_mixed", 1),
        ("shapecanvas_style100", 4),
        ("unlearncanvas_style", 1),
        ("celebrity", 1),
    ],
)
def test_a_quarter_of_the_evaluation_at_most(sequence, every):
    plan = compose([f"sequence={sequence}", "recovery=cheap"])
    assert 0 < probes_left(plan, 0).images <= SHARE * sum(work.images for work in work_of(plan))
    probes = plan.resolved["recovery"]
    found = {name: probes[name]["every"] for name in ("paraphrase", "completion", "residual")}
    assert found == {"paraphrase": every, "completion": every, "residual": 1}
    said = [note for note in plan.notes if note.startswith("recovery")]
    assert all(f"after every {every} requests" in note for note in said)
    assert len(said) == (every > 1)


def test_what_is_given_is_kept():
    plan = compose(
        ["sequence=shapecanvas_style100", "recovery=cheap", "recovery.completion.every=7"]
    )
    assert plan.resolved["recovery"]["completion"]["every"] == 7
    assert plan.resolved["recovery"]["paraphrase"]["every"] < 4  # which has the quarter alone


def test_every_so_many_requests_by_hand(sequence):
    one, two = list(sequence.targets[:1]), list(sequence.targets[:2])
    small = dataclasses.replace(sequence, targets=tuple(two), seeds=(0, 1, 2, 3))
    assert (small.num_images(two[0]), len(small.retain)) == (8, 2)
    # evaluated: 8 images of 2 + 2, 1 + 2 and 2 + 2 concepts, 88; a quarter is 22
    cheap = {"completion": Completion([0.5], images=2, controls=1)}
    # 2 images of 1 + 1 and 2 + 1 concepts, and of 2 + 1 in the untouched model: 16
    assert affordable(cheap, [one, two], small) == (1, "")
    more = {"completion": Completion([0.5], images=3, controls=1)}  # 24; after the last alone 18
    every, said = affordable(more, [one, two], small)
    assert every == 2
    assert "after the last alone, 18 images at most beside 88 of the evaluation" in said
    assert "over a quarter" not in said
    costly = Completion([0.5], images=8, controls=2)  # 64 after the last alone
    every, said = affordable({"completion": costly}, [one, two], small)
    assert (every, costly.every) == (2, 2)
    assert "64 images at most beside 88 of the evaluation: over a quarter" in said
    every, said = affordable({"completion": costly}, [two], small)  # one request
    assert (every, "over a quarter" in said) == (1, True)


def test_levels_are_counted_in_their_own_domain():
    lists = ["paraphrases_shapecanvas_styles", "paraphrases_shapecanvas_objects"]
    mixed = compose(["sequence=shapecanvas_mixed"]).sequence.build()
    for facing in mixed.by_domain:
        assert Paraphrase(lists, images=3).cost(facing, 2) == Cost(images=6)
