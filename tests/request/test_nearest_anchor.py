"""Anchors chosen by what the model predicts."""

import pytest

from cu_runner.request import nearest_anchor
from cu_runner.request.nearest_anchor import nearest_by_prediction, nearest_texts
from cu_runner.runtime.lazy import torch
from cu_runner.schema.settings import Sampler


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(nearest_anchor, "DRAWN", Sampler(steps=2, guidance=1.0))


def test_the_same_prompt_has_distance_zero_and_a_synonym_is_near(model):
    wanted = ["a painting of a ball", "an image of a ball"]
    candidates = {
        name: [f"a painting of a {name}", f"an image of a {name}"]
        for name in ("tree", "ball", "sphere", "key")
    }
    found = nearest_by_prediction(model, wanted, candidates, draws=4, batch_size=3)
    assert [each.text for each in found[:2]] == ["ball", "sphere"]
    assert found[0].squared == pytest.approx(0, abs=1e-10)
    assert found == sorted(found, key=lambda each: each.squared)
    again = nearest_by_prediction(model, wanted, candidates, draws=4, batch_size=4)
    assert [each.squared for each in again] == pytest.approx(
        [each.squared for each in found], rel=1e-4, abs=1e-10
    )


def test_the_distance_by_hand(model, monkeypatch):
    """With predictions that are the number of a prompt, it is the mean squared difference."""
    numbers = {"p": 1.0, "q": 3.0, "r": 2.0}

    def encode(prompts):
        return prompts

    def predict(noisy, timesteps, prompts):
        values = torch.tensor([numbers[prompt] for prompt in prompts])
        return values.view(-1, 1, 1, 1).expand_as(noisy)

    monkeypatch.setattr(nearest_anchor, "nearest_texts", lambda *told: ["one", "other"])
    monkeypatch.setattr(
        nearest_anchor,
        "sample_latents",
        lambda model, prompts, *rest: torch.zeros(len(prompts), *model.latent_shape),
    )
    monkeypatch.setattr(model, "encode_prompts", encode)
    monkeypatch.setattr(model, "predict", predict)
    found = nearest_by_prediction(model, ["p"], {"one": ["q"], "other": ["r", "q"]}, draws=4)
    assert [(each.text, each.squared) for each in found] == [("other", 2.5), ("one", 4.0)]


def test_the_shortlist_is_by_text(model):
    candidates = {name: [f"a {name}"] for name in ("key", "tree", "sphere", "ball")}
    assert nearest_texts(model, ["a ball"], candidates, 1) == ["ball"]
    assert nearest_texts(model, ["a ball"], candidates, 9) == list(candidates)


def test_no_candidate_is_refused(model):
    with pytest.raises(ValueError, match="name an anchor"):
        nearest_by_prediction(model, ["a ball"], {})
