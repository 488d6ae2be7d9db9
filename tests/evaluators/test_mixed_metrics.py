"""Metrics of sequences with targets of several domains, worked out by hand."""

import pandas as pd
import pytest
from conftest import read_conf

from cu_runner.concepts.mixed_sequence import DomainLists, make_mixed_sequence
from cu_runner.evaluators.evaluate import domain_columns, only_own_faces
from cu_runner.evaluators.metrics import (
    MEASURES,
    forgotten_of,
    measured_by,
    measured_in,
    mixed_metrics,
    named_metrics,
    shown_in,
    step_metrics,
)
from cu_runner.methods._closed_form import bare

CONF = read_conf("sequence/shapecanvas_mixed.yaml")

# measures, style, predicted style, object, predicted object
ROWS = [
    ("style", "a", "a", "cat", "cat"),
    ("style", "a", "x", "dog", "cat"),  # style a 1/2
    ("style", "r", "r", "cat", "cat"),
    ("style", "r", "r", "dog", "dog"),
    ("style", "s", "r", "cat", "cat"),
    ("style", "s", "s", "dog", "dog"),  # style r 2/2, s 1/2; objects 5/6, retained 4/4
    ("object", "r", "x", "tree", "tree"),
    ("object", "s", "s", "tree", "tree"),
    ("object", "r", "x", "hat", "cat"),
    ("object", "s", "s", "hat", "hat"),  # object tree 2/2, hat 1/2
    ("object", "r", "x", "cat", "cat"),
    ("object", "s", "s", "cat", "dog"),  # object cat 1/2; styles 3/6, retained 1/2
]
COLUMNS = [MEASURES, "style", "predicted_style", "object", "predicted_object"]
PARTS = [
    ("style", "object", ["a"], ["r", "s"]),
    ("object", "style", ["tree", "hat"], ["cat"]),
]


def build(**changes):
    arguments = CONF | changes
    domains = {name: DomainLists(**lists) for name, lists in arguments.pop("domains").items()}
    return make_mixed_sequence(**arguments, domains=domains)


@pytest.fixture
def predictions():
    return pd.DataFrame(ROWS, columns=COLUMNS)


@pytest.fixture
def parts():
    return measured_in(
        {
            "targets": [{"style": "a"}, {"object": "tree"}, {"object": "hat"}],
            "domains": {
                domain: {"cross_domain": cross, "retain": retain}
                for domain, cross, _, retain in PARTS
            },
        }
    )


def test_the_parts_of_a_configuration(parts):
    found = [(each.domain, each.cross_domain, each.targets, each.retain) for each in parts]
    assert found == PARTS


def test_after_a_style_only_what_measures_styles_counts(predictions, parts):
    assert mixed_metrics(predictions, ["a"], parts) == {
        "UA": 50.0,
        "RA_I": 75.0,
        "RA_C": round(100 * 5 / 6, 3),
        "RA_C_retained": 100.0,
        "UA_current": 50.0,
        "UA_previous": None,
    }


def test_each_concept_is_judged_in_its_own_domain(predictions, parts):
    assert mixed_metrics(predictions, ["a", "tree", "hat"], parts) == {
        "UA": round(100 - (50 + 100 + 50) / 3, 3),  # every concept with one weight
        "RA_I": round((100 + 50 + 50) / 3, 3),
        "RA_C": round(100 * (5 + 3) / (6 + 6), 3),  # every image with one weight
        "RA_C_retained": round(100 * (4 + 1) / (4 + 2), 3),
        "UA_current": 50.0,
        "UA_previous": 25.0,  # a 50, tree 0
    }
    base = mixed_metrics(predictions, [], parts)
    assert base["UA"] == round(100 - 200 / 3, 3)
    assert (base["RA_C"], base["UA_current"]) == (round(800 / 12, 3), None)


def test_with_one_domain_the_numbers_are_those_of_a_plain_sequence(predictions, parts):
    rows = predictions[predictions[MEASURES] == "style"]
    plain = named_metrics(rows, ["a"], "style", ["a"], ["r", "s"], ["cat", "dog"])
    assert mixed_metrics(rows, ["a"], parts[:1]) == plain


def test_faces_count_in_their_own_domain_alone(predictions, parts):
    seen = {"predicted_style": "x", "face": 0, "faces_of": "style"}
    own, other = {MEASURES: "style"}, {MEASURES: "object"}
    assert only_own_faces(seen, own) == {"predicted_style": "x", "face": 0}
    assert only_own_faces(seen, other) == {"predicted_style": "x", "face": 1}
    assert only_own_faces(seen, {"style": "x"}) is seen
    predictions["face"] = 1
    predictions.loc[[0, 1, 5], "face"] = 0  # no image of style a shows one
    found = mixed_metrics(predictions, ["a", "tree"], parts)
    assert found["UA"] == 0.0  # that of tree
    assert (found["faceless_unlearned"], found["faceless_retained"]) == (2, 1)
    assert forgotten_of(predictions, parts, ["a"]) is None


def test_what_each_image_shows(predictions, parts):
    concepts, crosses = shown_in(predictions, parts)
    objects = [name for name in ("tree", "hat", "cat") for _ in range(2)]
    assert list(concepts) == [*"aarrss", *objects]
    assert list(crosses) == ["cat", "dog"] * 3 + ["r", "s"] * 3


# ---------------------------------------------------------------------------------------- sequences
def test_a_request_faces_its_own_domain_and_knows_every_target():
    sequence = build()
    assert [(each.domain, each.name) for each in sequence.targets] == [
        ("style", "blaze"),
        ("object", "ball"),
        ("style", "glacier"),
        ("object", "box"),
        ("style", "cedar wood"),
        ("object", "tent"),
    ]
    style, ball = sequence.targets[:2]
    assert sequence.facing(style) is sequence
    facing = sequence.facing(ball)
    assert (facing.domain, facing.cross_domain) == ("object", "style")
    assert facing.targets == sequence.targets
    assert "ball" in facing.vocabulary
    assert facing.retain[0].name == "tree"
    for each in (sequence, facing):
        assert each.training_pairs(ball)[0] == (
            "a ball in the style of furnace",
            "a gear in the style of furnace",
        )
        assert each.training_pairs(style)[0] == ("a cross in the style of blaze", "a cross")
        assert len(each.evaluation_images([style, ball])) == 16
        assert each.num_images(ball) == 8
        assert each.evaluation_images([ball])[0].prompt == "a ball image in lava flow style"
    assert len(sequence.retained) == 16
    image = sequence.evaluation_images([ball])[0]
    assert domain_columns(sequence, image, "object") == {
        MEASURES: "object",
        "style": "lava flow",
        "object": "ball",
    }
    assert [part.domain for part in measured_by(sequence)] == ["style", "object"]


def test_bare_names_are_bare_in_every_domain():
    sequence = bare(build())
    style, ball = sequence.targets[:2]
    assert sequence.training_pairs(style) == [("blaze", "")]
    assert sequence.training_pairs(ball) == [("ball", "gear")]
    assert sequence.facing(ball).prompts_naming("ball") == ["ball"]


def test_orders_of_requests_run_over_all_domains():
    names = [target.name for target in build(order="reversed").targets]
    assert names == ["tent", "cedar wood", "box", "glacier", "ball", "blaze"]
    assert build(order="reversed").domain == "object"


def changed(domain: str, **lists) -> dict:
    return {**CONF["domains"], domain: CONF["domains"][domain] | lists}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": [{"style": "blaze"}]}, r"^sequence.domains.object: no target is of it"),
        ({"targets": [{"look": "blaze"}]}, r"^sequence.targets.0: .*; write one of {style: NAME}"),
        ({"targets": [{"style": "a", "object": "b"}]}, r"^sequence.targets.0: .* is no target"),
        (
            {"targets": [{"style": "blaze"}, {"object": "ball"}, {"style": "blaze"}]},
            r"^sequence.targets lists blaze more than once",
        ),
        (
            {"domains": changed("style", cross_retain=["tree", "ball"])},
            r"^sequence.domains.style.cross_retain: ball is a target of object",
        ),
        (
            {"domains": changed("object", retain=["tree", "sleet"])},
            r"^sequence.domains: sleet is measured as style and as object",
        ),
        (
            {"domains": changed("object", retain=["tree", "tree"])},
            r"^sequence.domains.object: sequence.retain lists tree more than once",
        ),
        ({"images": {"tree": "x"}}, r"^sequence.images.tree: is not in sequence.targets"),
    ],
)
def test_what_is_wrong_is_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as said:
        build(**changes)
    assert "\n" not in str(said.value)


def test_step_metrics_of_a_mixed_sequence_are_the_mixed_ones():
    sequence = build()
    rows = [
        {MEASURES: "style", "style": name, "object": "tree"}
        for name in ("blaze", *(kept.name for kept in sequence.by_domain[0].retain))
    ]
    table = pd.DataFrame(rows)
    table["predicted_style"] = ["dune", *table["style"][1:]]
    table["predicted_object"] = table["object"]
    found = step_metrics(table, ["blaze"], sequence)
    assert (found["UA"], found["RA_I"], found["RA_C"]) == (100.0, 100.0, 100.0)
