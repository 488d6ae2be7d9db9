"""MACE's closed forms: which tokens are paired, and all three stages evaluated one by one."""

import dataclasses

import numpy as np
import pytest
import torch

from cu_runner.concepts.sequence import Concept
from cu_runner.methods._closed_form import edit_sums
from cu_runner.methods.mace_fusion import (
    CAPTIONS,
    MACEFusion,
    concept_changes,
    fused_change,
    shared_places,
)
from cu_runner.request.images import RetainSet

OUT, WIDTH = 3, 7


def rows(number: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, WIDTH))


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def test_shared_places_by_hand():
    """Begin 0 and end 9; words 1 to 5, the concept is 4 5, the generic word 3."""
    own, anchor = [0, 1, 4, 5, 2, 9], [0, 1, 3, 2, 9]
    assert shared_places(own, anchor, length=8) == ([0, 1, 4, 5, 6, 7], [0, 1, 3, 4, 5, 6])
    assert shared_places(anchor, own, length=8) == ([0, 1, 3, 4, 5, 6], [0, 1, 4, 5, 6, 7])
    # nothing in the concept's place
    assert shared_places(own, [0, 1, 2, 9], length=7) == ([0, 1, 4, 5, 6], [0, 1, 2, 3, 4])
    assert shared_places(own, own, length=7) == ([*range(7)], [*range(7)])
    # a repeated word is paired once
    assert shared_places([0, 1, 1, 9], [0, 1, 9], length=4) == ([0, 1, 3], [0, 1, 2])


def literal(W, beside, generic, own, wanted, text, kept, strength, ridge):
    """Stage 1, the change of each concept, stage 3; rows of each concept in lists."""
    eye = np.eye(WIDTH)
    prior = strength * kept.T @ kept
    all_beside, all_generic = np.concatenate(beside), np.concatenate(generic)
    refined = (ridge * W + W @ all_generic.T @ all_beside + W @ prior) @ np.linalg.inv(
        ridge * eye + all_beside.T @ all_beside + prior
    )
    left, right = ridge * W + W @ prior, ridge * eye + prior
    for c, a, t in zip(own, wanted, text, strict=True):
        change = (W @ a.T - refined @ c.T) @ c @ np.linalg.inv(t.T @ t + ridge * eye)
        left = left + (refined + change) @ t.T @ t
        right = right + t.T @ t
    return refined, left @ np.linalg.inv(right)


@pytest.mark.parametrize(("strength", "ridge"), [(0.7, 0.5), (1e-3, 0.05)])
def test_all_stages_by_the_published_forms(strength, ridge):
    W = np.random.default_rng(0).standard_normal((OUT, WIDTH))
    own, wanted = [rows(2, 1), rows(3, 2)], [rows(2, 3), rows(3, 4)]
    beside, generic = [rows(4, 5), rows(2, 6)], [rows(4, 7), rows(2, 8)]
    text = [np.concatenate([each, rows(3, 9)]) for each in own]
    kept = rows(6, 10)
    _, expected = literal(W, beside, generic, own, wanted, text, kept, strength, ridge)
    sums = sum(
        torch.cat(
            [
                edit_sums(*tensors(e, g)).matrices,
                concept_changes(
                    edit_sums(*tensors(c, a)).matrices, torch.from_numpy(t.T @ t), ridge=ridge
                ),
            ]
        )
        for e, g, c, a, t in zip(beside, generic, own, wanted, text, strict=True)
    )
    prior = torch.from_numpy(strength * kept.T @ kept)
    moved = fused_change(sums, prior, ridge=ridge).numpy()
    np.testing.assert_allclose(W + W @ moved, expected, atol=1e-10)
    assert np.abs(W @ moved).max() > 0.1


def test_nothing_to_move_changes_nothing():
    c, t = tensors(rows(2, 1), rows(5, 2))
    same = edit_sums(c, c).matrices
    sums = torch.cat([same, concept_changes(same, t.T @ t, ridge=0.5)])
    assert fused_change(sums, torch.zeros(WIDTH, WIDTH).double(), ridge=0.5).abs().max() < 1e-12


def test_the_sums_of_a_concept_are_those_of_its_prompts(make_scope, sequence):
    """A concept in the middle of its prompts, with an anchor of one word."""
    scope = make_scope()
    sequence = dataclasses.replace(
        sequence,
        target_prompt=("a {concept} {caption}",),
        anchor_prompt="a {anchor} {caption}",
        captions=("ball", "tent"),
    )
    scope = dataclasses.replace(scope, sequence=sequence)
    model, method = scope.model, MACEFusion(ridge=0.3)
    found = method._sums_of(scope, Concept("torch light", "style", anchor="river"))
    span = model.token_span("torch light", "a torch light ball")
    words = model.num_tokens - span.stop  # after the concept, and one of them lacks a partner
    gap = span.stop - 3  # tokens that the anchor has less
    beside, generic, own, wanted, text = [], [], [], [], []
    for caption in ("ball", "tent"):
        prompts = [f"a torch light {caption}", f"a river {caption}"]
        one, other = model.encode_prompts(prompts).hidden.double()
        assert len(model.tokenizer(prompts[0]).input_ids) == (
            len(model.tokenizer(prompts[1]).input_ids) + gap
        )
        beside += [one[:2], one[span.stop :]]
        generic += [other[:2], other[3 : 3 + words]]
        own.append(one[span])
        wanted.append(other[span])
        text.append(one)
    e, g, c, a, t = (torch.cat(each) for each in (beside, generic, own, wanted, text))
    gram = t.T @ t
    inverse = torch.linalg.inv(gram + 0.3 * torch.eye(len(gram)).double())
    expected = [e.T @ e, (g - e).T @ e, gram, a.T @ c @ inverse @ gram, c.T @ c @ inverse @ gram]
    for matrix, wanted in zip(found.matrices, expected, strict=True):
        torch.testing.assert_close(matrix, wanted, rtol=1e-6, atol=1e-6)


def test_the_prior_weighs_as_30000_captions_however_many_prompts_are_kept(make_scope):
    scope = make_scope()
    method = MACEFusion(retain=RetainSet("names", prompts=4))
    text = method.batch(scope, 0)
    twice = dataclasses.replace(text, preserved=text.preserved.repeat(2, 1))
    one, two = (method.solve(method.solved(scope), each) for each in (text, twice))
    sums = method._sums.total(method.solved(scope)).matrices
    mean = text.preserved.double().T @ text.preserved.double() / len(text.preserved)
    moved = fused_change(sums, 1e-4 * CAPTIONS * scope.model.num_tokens * mean, ridge=0.5)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6)
        old = scope.base[name].double()
        torch.testing.assert_close(weight.double(), old + old @ moved, rtol=1e-5, atol=1e-6)


def test_the_concept_arrives_nearer_to_its_anchor(make_scope):
    scope = make_scope()
    method = MACEFusion(retain=RetainSet("names", prompts=8))
    logs = method.backward(scope, method.batch(scope, 0))
    assert logs["loss"] < 0.2 * logs["before"]
    assert logs["preservation_loss"] < 0.1 * logs["before"]


def test_bad_settings_are_one_line(in_process):
    status, _, err = in_process(
        "sequence=smoke", "method=mace_fusion", "method.ridge=0", "wandb.mode=disabled"
    )
    assert (status, err.count("\n")) == (2, 1)
    assert "method.ridge=0" in err
