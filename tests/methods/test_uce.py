"""UCE: the closed form on small matrices, which tokens it edits, what it does to the embedded
model.
"""

import dataclasses

import pytest
import torch
from conftest import run_directory

from cu_runner.concepts.requests import plan_requests
from cu_runner.methods.uce import UCE, edited_weight
from cu_runner.models.parameters import assign, snapshot
from cu_runner.request.images import RetainSet
from cu_runner.runner.training import check_composition, erase

OUT, WIDTH = 3, 6
NOTHING = torch.zeros(0, WIDTH)


@pytest.fixture
def drawn():
    """W [out, D], four rows to edit [4, D], their values [4, out], five rows to preserve [5, D]."""
    draw = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(rows, columns, generator=draw)
        for rows, columns in ((OUT, WIDTH), (4, WIDTH), (4, OUT), (5, WIDTH))
    )


# -------------------------------------------------------------------------------------- closed form
def test_one_orthogonal_edit_by_hand():
    """c = 2 e_1, v* = (3, 5): S = 4 e_1 e_1^T + lam I, so the first column goes to (2 v* + lam w_1)
    / (4 + lam).
    """
    weight, edited, values = (
        torch.tensor([[1.0, 7.0], [1.0, 7.0]]),
        torch.tensor([[2.0, 0.0]]),
        torch.tensor([[3.0, 5.0]]),
    )
    found = edited_weight(weight, edited, values, torch.zeros(0, 2), preserve=1.0, ridge=1.0)
    torch.testing.assert_close(found, torch.tensor([[7 / 5, 7.0], [11 / 5, 7.0]]))


@pytest.mark.parametrize(("preserve", "ridge"), [(1.0, 0.5), (0.0, 2.0), (7.0, 0.1)])
def test_the_published_form_of_equation_7(drawn, preserve, ridge):
    weight, edited, values, kept = (each.double() for each in drawn)
    left = values.T @ edited + preserve * weight @ kept.T @ kept + ridge * weight
    right = (
        edited.T @ edited + preserve * kept.T @ kept + ridge * torch.eye(WIDTH, dtype=torch.float64)
    )
    found = edited_weight(weight, edited, values, kept, preserve=preserve, ridge=ridge)
    torch.testing.assert_close(found, left @ right.inverse(), rtol=1e-9, atol=1e-9)


def test_it_is_the_minimum_of_its_objective(drawn):
    weight, edited, values, kept = (each.double() for each in drawn)
    found = edited_weight(weight, edited, values, kept, preserve=2.0, ridge=0.3).requires_grad_(
        True
    )
    objective = (
        (edited @ found.T - values).square().sum()
        + 2.0 * (kept @ (found - weight).T).square().sum()
        + 0.3 * (found - weight).square().sum()
    )
    objective.backward()
    assert found.grad.abs().max() < 1e-10


def test_a_large_ridge_leaves_the_weight(drawn):
    found = edited_weight(*drawn, preserve=1.0, ridge=1e12)
    assert torch.equal(found, drawn[0])
    distances = [
        (edited_weight(*drawn, preserve=1.0, ridge=ridge) - drawn[0]).norm().item()
        for ridge in (0.1, 1.0, 10.0, 100.0)
    ]
    assert distances == sorted(distances, reverse=True)


def test_without_ridge_independent_rows_are_fitted_exactly_and_the_rest_stays(drawn):
    weight, edited, values, _ = drawn
    found = edited_weight(weight, edited, values, NOTHING, preserve=1.0, ridge=0.0)
    torch.testing.assert_close(edited @ found.T, values, rtol=1e-4, atol=1e-5)
    others = torch.linalg.qr(edited.T, mode="complete").Q[:, 4:]  # orthogonal to what is edited
    torch.testing.assert_close(found @ others, weight @ others, rtol=1e-4, atol=1e-5)


def test_a_large_weight_preserves_exactly_what_is_orthogonal_or_not(drawn):
    weight, edited, values, kept = drawn
    kept = kept[:2]
    found = edited_weight(weight, edited, values, kept, preserve=1e8, ridge=1e-3)
    torch.testing.assert_close(kept @ found.T, kept @ weight.T, rtol=0, atol=1e-4)
    assert (edited @ (found - weight).T).norm() > 0.1


def test_nothing_to_edit_changes_nothing(drawn):
    weight, edited, _, kept = drawn
    assert edited_weight(weight, NOTHING, torch.zeros(0, OUT), kept, preserve=1.0, ridge=0.5).equal(
        weight
    )
    unmoved = edited_weight(weight, edited, edited @ weight.T, kept, preserve=1.0, ridge=0.5)
    torch.testing.assert_close(unmoved, weight, rtol=1e-5, atol=1e-6)


def test_single_precision_weights_are_solved_in_double(drawn):
    """Nearly equal rows, one preserved and one edited: in single precision their difference would
    be lost.
    """
    weight = drawn[0]
    kept = torch.ones(1, WIDTH)
    edited = kept + torch.tensor([[1e-3, 0, 0, 0, 0, 0]])
    found = edited_weight(weight, edited, torch.zeros(1, OUT), kept, preserve=1.0, ridge=1e-12)
    assert found.dtype == torch.float32
    torch.testing.assert_close(kept @ found.T, kept @ weight.T, rtol=0, atol=1e-2)
    torch.testing.assert_close(edited @ found.T, torch.zeros(1, OUT), rtol=0, atol=1e-2)


# ------------------------------------------------------------------------------------------- tokens
def test_positions_from_the_concept_on_go_to_those_of_the_anchor_and_the_others_stay(make_scope):
    scope = make_scope()
    model = scope.model
    batch = UCE(retain=RetainSet("anchors")).batch(scope, 0)
    hidden = model.encode_prompts(["a ball in the style of torch light", "a ball"]).hidden
    length = hidden.shape[1]
    # begin, a, ball: the text encoder is causal
    assert torch.equal(hidden[0, :3], hidden[1, :3])
    assert batch.concept.shape == batch.anchor.shape == (4 * length, hidden.shape[2])
    assert torch.equal(batch.concept[:length], hidden[0])
    assert torch.equal(batch.anchor[:7], hidden[0, :7])  # up to "of"
    assert torch.equal(batch.anchor[7:length], hidden[1, 7:])
    kept = model.encode_prompts(["a ball", "a box", "a tent", "a hoop"]).hidden
    assert torch.equal(batch.preserved, kept.flatten(0, 1))


def test_earlier_targets_are_preserved_and_all_targets_edited(make_scope, sequence):
    retain = RetainSet("anchors")
    length, captions = (
        make_scope().model.encode_prompts([""]).hidden.shape[1],
        len(sequence.captions),
    )
    scope = make_scope(request=2)
    batch = UCE(retain=retain).batch(scope, 0)
    assert len(batch.preserved) == 2 * captions * length
    earlier = scope.model.encode_prompts(["a ball in the style of torch light"]).hidden[0]
    assert torch.equal(batch.preserved[captions * length :][:length], earlier)
    both = dataclasses.replace(scope, request=plan_requests(sequence, "simultaneous")[1])
    together = UCE(retain=retain).batch(both, 0)
    assert len(together.concept) == 2 * len(batch.concept)
    assert len(together.preserved) == captions * length


# ------------------------------------------------------------------------------------------ request
@torch.no_grad()
def test_an_exact_fit_makes_the_concept_act_like_its_anchor(make_scope, settings):
    """One caption, nothing preserved, hardly a ridge: the prediction becomes the anchor's."""
    scope = make_scope()
    sequence = dataclasses.replace(
        scope.sequence, captions=("tree",), target_prompt=("a {caption} {concept}",)
    )
    scope = dataclasses.replace(scope, sequence=sequence)
    model, draw = scope.model, torch.Generator().manual_seed(0)
    noisy, timesteps = torch.randn(2, *model.latent_shape, generator=draw), torch.tensor([200, 600])
    concept, anchor = (
        model.encode_prompts([prompt] * 2) for prompt in ("a tree torch light", "a tree")
    )
    wanted, before = (
        model.predict(noisy, timesteps, anchor),
        model.predict(noisy, timesteps, concept),
    )
    report = erase(
        scope, UCE(preserve=0.0, ridge=1e-9, retain=RetainSet("anchors")), {}, settings(steps=50)
    )
    after = model.predict(noisy, timesteps, concept)
    assert (after - wanted).norm() < 1e-2 * (before - wanted).norm()
    assert len(report.logs) == 1
    assert report.logs[0]["loss"] < 1e-6 * report.logs[0]["before"]


def test_logs_are_mean_squares_before_and_after(make_scope, settings):
    scope = make_scope()
    method = UCE(retain=RetainSet("both", prompts=10))
    batch = method.batch(scope, 0)
    (row,) = erase(scope, method, {}, settings()).logs
    gaps = {"loss": [], "before": [], "preservation_loss": []}
    for name, parameter in scope.params.items():
        old, new = scope.base[name], parameter.detach()
        gaps["loss"].append((batch.concept @ new.T - batch.anchor @ old.T).square().mean().item())
        gaps["before"].append(((batch.concept - batch.anchor) @ old.T).square().mean().item())
        gaps["preservation_loss"].append((batch.preserved @ (new - old).T).square().mean().item())
    assert row == pytest.approx(
        {"step": 1} | {name: sum(each) / len(each) for name, each in gaps.items()}, rel=1e-4
    )
    assert row["loss"] < 0.1 * row["before"]


def test_backward_leaves_weights_and_gradients_alone(make_scope):
    scope = make_scope()
    method = UCE(retain=RetainSet("anchors"))
    method.begin_request(scope)
    method.backward(scope, method.batch(scope, 0))
    assert all(torch.equal(parameter, scope.base[name]) for name, parameter in scope.params.items())
    assert all(parameter.grad is None for parameter in scope.params.values())


def test_a_later_request_does_not_depend_on_an_earlier_one(make_scope, settings):
    used, fresh = UCE(), UCE()
    scope = make_scope()
    erase(scope, used, {}, settings())
    results = []
    for method in (used, fresh):
        assign(scope.params, scope.base)
        second = make_scope(request=2)
        erase(second, method, {}, settings())
        results.append(snapshot(second.params))
    assert all(torch.equal(results[0][name], weight) for name, weight in results[1].items())


def test_two_requests_with_the_step_projected(in_process, filled_cache, tmp_path):
    run = (
        "sequence=smoke",
        "method=uce",
        "method.retain.prompts=8",
        "model.sampler.steps=2",
        "wandb.mode=disabled",
        "num_threads=1",
    )
    status, out, err = in_process(*run, "reg=gradproj", "reg.gradproj.apply=update")
    assert status == 0, err
    table = (run_directory(out, tmp_path) / "metrics.csv").read_text().splitlines()
    assert len(table) == 4  # header, base, two requests
    column = table[0].split(",").index("train_steps")
    assert [row.split(",")[column] for row in table[1:]] == ["0", "1", "1"]
    status, _, err = in_process(*run, "reg=gradproj")
    assert status != 0
    assert "reg=gradproj acts on the gradient" in err


def test_other_weights_are_refused(in_process):
    status, _, err = in_process(
        "sequence=smoke", "method=uce", "method.params=full", "wandb.mode=disabled"
    )
    assert status != 0
    assert "method.params='full'" in err
    assert "'kv_xattn'" in err


# --------------------------------------------------------------------------------------- cumulative
def test_all_targets_so_far_are_solved_for_from_the_untouched_weights(make_scope, settings):
    """As eq. 7 of all their positions at once, wherever the weights were."""
    retain = RetainSet("names", prompts=8)
    scope = make_scope(request=2)
    for parameter in scope.params.values():
        parameter.data += 0.1
    erase(scope, UCE(cumulative=True, retain=retain), {}, settings())
    hidden = [
        scope.model.encode_prompts(
            [f"a {caption}{words}" for caption in scope.sequence.captions]
        ).hidden.flatten(0, 1)
        for words in (" in the style of torch light", " in the style of snow drift", "")
    ]
    length = scope.model.num_tokens
    wanted = torch.cat([hidden[2]] * 2).view(-1, length, hidden[2].shape[1]).clone()
    concept = torch.cat(hidden[:2])
    wanted[:, :7] = concept.view(wanted.shape)[:, :7]  # what stands before is held
    wanted = wanted.flatten(0, 1)
    kept = scope.model.encode_prompts(retain.read(scope)).hidden.flatten(0, 1)
    for name, parameter in scope.params.items():
        old = scope.base[name].double()
        expected = edited_weight(old, concept, wanted.double() @ old.T, kept, preserve=1, ridge=0.5)
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_runs_in_either_order_end_with_the_same_bits(in_process, filled_cache, tmp_path):
    deltas = []
    for order in ("paper", "reversed"):
        status, out, err = in_process(
            "sequence=smoke",
            f"sequence.order={order}",
            "method=uce",
            "method.cumulative=true",
            "method.retain.prompts=8",
            "model.sampler.steps=2",
            "wandb.mode=disabled",
            "num_threads=1",
        )
        assert (status, err) == (0, "")
        directory = run_directory(out, tmp_path)
        deltas.append(
            [(directory / f"steps/0{step}/delta.safetensors").read_bytes() for step in (1, 2)]
        )
    assert deltas[0][1] == deltas[1][1]
    assert deltas[0][0] != deltas[1][0]


def test_it_is_a_closed_form():
    check_composition(UCE(), {})
    assert UCE.closed_form
