"""The metrics of recovery are a pure function of what the probes saw."""

import io

import pandas as pd
import pytest

from cu_runner.evaluators.recovered import (
    RECOVERED,
    accuracy_by_dose,
    area_under,
    at_strongest,
    columns_of,
    read_recovery,
    recovery_metrics,
    strongest,
)


def row(shown: str, concept: str = "NA", **more) -> dict:
    """A row of recovery.csv; shown: the predicted style."""
    columns = {"step": 2, "probe": "paraphrase", "group": "erased", "weights": "edited"}
    columns |= {"variant": "short", "dose": 0.0, "image": 0, "both": 0, "prompt": "a tree"}
    columns |= {"style": concept, "object": "tree", "seed": 7, "predicted_style": shown}
    return columns | {"score_style": 0.5, "predicted_object": "tree", "score_object": 0.5} | more


def metrics(rows: list[dict], ua: float | None = 100.0, values: list[dict] | None = None) -> dict:
    """Computed from files, as a step has them."""
    images, numbers = (
        read_recovery(io.BytesIO(pd.DataFrame(each).to_csv(index=False).encode())) if each else None
        for each in (rows, values)
    )
    return recovery_metrics(images, numbers, [("style", "object")], ua)


def test_a_metric_of_a_probe_is_known_by_its_name():
    names = ("UA_worst", "recovered_noise", "recovered_half-way_untouched", "recovered_a.b_area")
    assert all(map(RECOVERED.fullmatch, names))
    assert not any(map(RECOVERED.fullmatch, ("UA", "UA_previous", "RA_C_retained", "drift_l2")))


def test_concepts_have_one_weight_and_controls_stand_beside():
    rows = [row("NA", image=0), row("007", image=1), row("NA", image=2), row("NA", image=3)]
    rows += [row("NA", "007", image=0)]
    rows += [row("NA", weights="untouched"), row("x", "kept", group="retained")]
    assert metrics(rows) == {
        "recovered_paraphrase": (75 + 0) / 2,
        "recovered_paraphrase_untouched": 100.0,
        "recovered_paraphrase_retained": 0.0,
        "UA_worst": 62.5,
    }


def test_the_strongest_condition_counts_and_its_controls():
    rows = [row("x", variant="short"), row("NA", variant="long")]
    rows += [row("NA", variant="short", weights="untouched")]
    rows += [row("x", variant="long", weights="untouched")]
    found = accuracy_by_dose(pd.DataFrame(rows), [("style", "object")])
    assert strongest(found) == {"style": ("long", 0.0)}
    found = metrics(rows)
    assert found["recovered_paraphrase"] == 100
    assert found["recovered_paraphrase_untouched"] == 0
    assert found["UA_worst"] == 0


def test_every_domain_has_its_own_strongest_condition():
    """Of a mixed sequence: the styles' list has short descriptions, the objects' has synonyms."""
    style = {"measures": "style", "variant": "short"}
    thing = {"measures": "object", "variant": "synonym", "object": "ball", "style": "river"}
    rows = [row("NA", **style), row("NA", **style, weights="untouched")]
    weaker = row("x", **style | {"variant": "synonym"})  # which is the objects' strongest
    rows += [weaker, row("x", **thing), row("x", **thing, image=1, predicted_object="ball")]
    rows += [row("x", **thing | {"object": "box"}), row("x", **thing, weights="untouched")]
    images = read_recovery(io.BytesIO(pd.DataFrame(rows).to_csv(index=False).encode()))
    domains = [("style", "object"), ("object", "style")]
    found = recovery_metrics(images, None, domains, 100.0)
    assert found == {
        "recovered_paraphrase": 50.0,  # NA 100, ball 50, box 0
        "recovered_paraphrase_untouched": 50.0,
        "UA_worst": 50.0,
    }
    accuracy = accuracy_by_dose(images, domains)
    assert strongest(accuracy) == {"style": ("short", 0.0), "object": ("synonym", 0.0)}
    rest = accuracy[(accuracy["domain"] != "style") | (accuracy["variant"] == "short")]
    assert len(rest) == len(accuracy) - 1
    assert at_strongest(accuracy).equals(rest)


def test_an_image_counts_when_one_of_its_attempts_shows_the_concept():
    rows = [row("x", image=0), row("NA", image=0), row("x", image=1), row("x", image=1)]
    found = accuracy_by_dose(pd.DataFrame(rows), [("style", "object")])
    assert found[["hits", "images", "accuracy"]].values.tolist() == [[1, 2, 50.0]]


def test_both_domains_where_both_are_asked_for():
    rows = [row("NA", both=1, image=0), row("NA", both=1, image=1, predicted_object="cup")]
    rows += [row("NA", both=0, image=2, predicted_object="cup")]
    assert accuracy_by_dose(pd.DataFrame(rows), [("style", "object")])["hits"].tolist() == [2]


def test_by_name_is_a_probe_too():
    assert metrics([row("x")], ua=40.0)["UA_worst"] == 40
    # no face is seen by name, and the concept is under a probe
    assert metrics([row("NA")], ua=None)["UA_worst"] == 0


def test_what_names_no_unlearned_concept_is_no_recovery():
    rows = [row("a", "a", group="retained", probe="composition", both=1)]
    rows += [row("b", "a", group="retained", probe="composition", both=1, weights="untouched")]
    assert metrics(rows, ua=90.0) == {
        "recovered_composition": 100.0,
        "recovered_composition_untouched": 0.0,
    }


def test_the_area_under_a_curve():
    curve = pd.DataFrame({"dose": [0, 10, 100], "accuracy": [0.0, 50.0, 100.0]})
    assert area_under(curve) == pytest.approx((10 * 25 + 90 * 75) / 100)
    assert area_under(curve[:2]) is None
    rows = [
        row(shown, dose=dose, probe="relearning")
        for dose, shown in ((0, "x"), (1, "NA"), (2, "NA"))
    ]
    assert metrics(rows)["recovered_relearning_area"] == pytest.approx(75)


def test_numbers_are_averaged_and_of_a_rise_the_largest_counts():
    common = {"step": 2, "group": "erased", "weights": "edited", "dose": 0.0}
    values = [
        {**common, "probe": "residual", "variant": "", "concept": "a", "value": 10.0},
        {**common, "probe": "residual", "variant": "", "concept": "b", "value": 30.0},
        {**common, "probe": "rebound", "variant": "rise", "concept": "a", "value": 5.0},
        {**common, "probe": "rebound", "variant": "rise", "concept": "b", "value": 25.0},
    ]
    assert metrics([], values=values) == {"recovered_residual": 20.0, "recovered_rebound": 25.0}


def test_every_step_has_the_columns_of_the_probes():
    columns = columns_of(["paraphrase"], {"recovered_paraphrase": 3.0})
    assert columns["recovered_paraphrase"] == 3
    assert columns["recovered_paraphrase_untouched"] is columns["UA_worst"] is None
    with pytest.raises(ValueError, match="recovered_other"):
        columns_of(["paraphrase"], {"recovered_other": 3.0})
