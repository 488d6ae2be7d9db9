"""EWC: its Fisher and penalty in closed form. Replay: its loss by hand, its batches. Both: resume,
composition.
"""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import SMOKE, run_directory
from doubles import Pull
from torch import nn

from cu_runner.methods.conabl import ConAbl
from cu_runner.models.parameters import assign, snapshot
from cu_runner.regularizers.ewc import EWC, diagonal_fisher, ewc_penalty
from cu_runner.regularizers.replay import Replay
from cu_runner.request.images import RetainSet
from cu_runner.runner.training import erase

RETAIN = RetainSet(prompts=8, images=8)


def trained(scope):
    """The scope with weights that are neither the start's nor the base's, ready for gradients."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in scope.params.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    for parameter in scope.params.values():
        parameter.requires_grad_(True)
    return scope


def batches(scope, purpose: str, number: int, batch_size: int = 1) -> list:
    images = RETAIN.images_of(scope)
    return [images.draw(scope.rng.generator(purpose, step), batch_size) for step in range(number)]


# ---------------------------------------------------------------------------------------------- EWC
def test_ewc_penalty_closed_form():
    """d = (1, 2), -4 with F = (0, 3), 1: half the mean of 0, 12, 16; its gradient is F d / n."""
    params = {
        "a": nn.Parameter(torch.tensor([1.0, 2.0])),
        "b": nn.Parameter(torch.tensor([[-3.0]])),
    }
    anchor = {"a": torch.zeros(2), "b": torch.ones(1, 1)}
    fisher = {"a": torch.tensor([0.0, 3.0]), "b": torch.ones(1, 1)}
    penalty = ewc_penalty(params, anchor, fisher)
    assert penalty.item() == pytest.approx(28 / 6, rel=1e-6)
    penalty.backward()
    assert [*params["a"].grad.tolist(), params["b"].grad.item()] == pytest.approx(
        [0, 6 / 3, -4 / 3], rel=1e-6
    )


def test_the_fisher_is_the_mean_of_squared_gradients(make_scope):
    scope = trained(make_scope())
    drawn = batches(scope, "ewc", 3)
    fisher = diagonal_fisher(scope.model, scope.params, drawn)
    assert all(parameter.grad is None for parameter in scope.params.values())
    squares = []
    for batch in drawn:  # by backward, one image at a time
        loss = F.mse_loss(
            scope.model.predict(batch.noisy, batch.timesteps, batch.texts[0]), batch.wanted
        )
        loss.backward()
        squares.append({name: parameter.grad.square() for name, parameter in scope.params.items()})
        for parameter in scope.params.values():
            parameter.grad = None
    for name, values in fisher.items():
        torch.testing.assert_close(
            values, sum(square[name] for square in squares) / 3, rtol=1e-4, atol=1e-12
        )
        assert values.min() >= 0


def test_ewc_scales_the_fisher_to_mean_one_and_draws_one_batch_per_number(make_scope):
    scope = trained(make_scope())
    regularizer = EWC(2.0, num_batches=3, retain=RETAIN)
    record = regularizer.begin_request(scope, Pull())
    raw = diagonal_fisher(scope.model, scope.params, batches(scope, "ewc", 3))
    mean = torch.cat([values.flatten() for values in raw.values()]).mean().item()
    assert record == {"fisher_mean": pytest.approx(mean, rel=1e-5), "prompts": 8}
    fisher = {name: values / mean for name, values in raw.items()}
    expected = 2 * ewc_penalty(scope.params, scope.start, fisher)
    assert regularizer.penalty(scope.params).item() == pytest.approx(expected.item(), rel=1e-4)
    assert expected.item() > 0.01


@pytest.mark.parametrize("anchor", ["previous", "base"])
def test_ewc_anchors(make_scope, anchor):
    """Zero at its anchor, and nowhere else."""
    scope = trained(make_scope())
    scope = dataclasses.replace(scope, start=snapshot(scope.params))
    regularizer = EWC(1e4, num_batches=2, anchor=anchor, retain=RETAIN)
    regularizer.begin_request(scope, Pull())
    assert (regularizer.penalty(scope.params).item() == 0) == (anchor == "previous")
    assign(scope.params, scope.base)
    assert (regularizer.penalty(scope.params).item() == 0) == (anchor == "base")


def test_ewc_holds_back_the_weights_that_matter(make_scope, settings):
    """Under the same pull, the weights of large F move less than those of small F; without EWC they
    move the same.
    """
    ratios = {}
    for weight in (0.0, 1e10):
        scope = make_scope()
        regularizer = EWC(weight, num_batches=4, retain=RETAIN)
        base = snapshot(scope.params)
        erase(
            scope,
            Pull(),
            {"ewc": regularizer},
            settings(steps=5, lr=1e-3, optimizer="adam", weight_decay=0.0),
        )
        moved = torch.cat(
            [(parameter - base[name]).abs().flatten() for name, parameter in scope.params.items()]
        )
        fisher = torch.cat([values.flatten() for values in regularizer._fisher.values()])
        large = fisher > fisher.quantile(0.9)
        ratios[weight] = (moved[large].mean() / moved[~large].mean()).item()
        assign(scope.params, base)
    assert ratios[0.0] == pytest.approx(1, abs=0.05)
    assert ratios[1e10] < 0.8 * ratios[0.0]


# ------------------------------------------------------------------------------------------- replay
@pytest.mark.parametrize("loss", ["model", "noise"])
def test_replay_closed_form(make_scope, loss):
    """Step n is 1.5 times the loss of batch n, with the base weights in the UNet itself."""
    scope = trained(make_scope())
    regularizer = Replay(1.5, loss, batch_size=3, retain=RETAIN)
    assert regularizer.begin_request(scope, Pull()) == {"prompts": 8}
    now = snapshot(scope.params)
    for batch in batches(scope, "replay", 2, 3):
        arguments = (batch.noisy, batch.timesteps, batch.texts[0])
        with torch.no_grad():
            predicted = scope.model.predict(*arguments)
            assign(scope.params, scope.base)
            wanted = {"model": scope.model.predict(*arguments), "noise": batch.wanted}[loss]
            assign(scope.params, now)
        penalty = regularizer.penalty(scope.params)
        assert penalty.item() == pytest.approx(
            1.5 * (predicted - wanted).square().mean().item(), rel=1e-5
        )
    penalty.backward()
    assert all(parameter.grad.norm() > 0 for parameter in scope.params.values())
    assert all(torch.equal(parameter, now[name]) for name, parameter in scope.params.items())


def test_matching_the_untouched_model_costs_nothing_before_the_first_step(make_scope):
    scope = make_scope()
    regularizer = Replay(1.0, retain=RETAIN)
    regularizer.begin_request(scope, Pull())
    assert regularizer.penalty(scope.params).item() < 1e-12
    noisy = Replay(1.0, "noise", retain=RETAIN)
    noisy.begin_request(scope, Pull())
    assert noisy.penalty(scope.params).item() > 0.01


def test_the_batch_is_that_of_training_unless_it_has_its_own(make_scope):
    def first(batch_size: int | None, training: int) -> float:
        scope = make_scope(batch_size=training)
        regularizer = Replay(1.0, "noise", batch_size, RETAIN)
        regularizer.begin_request(scope, Pull())
        return regularizer.penalty(scope.params).item()

    assert first(None, 5) == first(5, 2) == first(5, 5)
    assert first(None, 5) != first(None, 2)


def test_replay_draws_different_batches_and_begins_anew_with_each_request(make_scope):
    def losses(regularizer: Replay, request: int, number: int) -> list[float]:
        scope = make_scope(request)
        regularizer.begin_request(scope, Pull())
        return [regularizer.penalty(scope.params).item() for _ in range(number)]

    used = Replay(1.0, "noise", retain=RETAIN)
    first = losses(used, 1, 3)
    assert len(set(first)) == 3
    assert losses(used, 1, 2) == first[:2]
    assert losses(used, 2, 2) == losses(Replay(1.0, "noise", retain=RETAIN), 2, 2)
    assert losses(used, 2, 1) != first[:1]


# --------------------------------------------------------------------------------------------- both
@pytest.mark.parametrize(
    "make", [lambda: EWC(1e4, num_batches=2, retain=RETAIN), lambda: Replay(1.0, retain=RETAIN)]
)
@pytest.mark.parametrize("group", ["kv_xattn", "full"])
def test_a_second_request_does_not_depend_on_the_first(make_scope, settings, make, group):
    base, ends = make_scope(group=group).base, []
    for requests in ((1, 2), (2,)):
        regularizer, method = make(), ConAbl(num_anchors=4)
        for request in requests:
            scope = dataclasses.replace(make_scope(request, group=group), start=base, base=base)
            assign(scope.params, base)
            erase(scope, method, {"it": regularizer}, settings(steps=2))
        ends.append(snapshot(scope.params))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in base)
    assert sum(not torch.equal(ends[0][name], base[name]) for name in base) > 0.9 * len(base)


def test_they_run_together_and_with_gradproj(in_process, filled_cache, tmp_path):
    small = [
        f"reg.{name}.retain.{key}=6" for name in ("ewc", "replay") for key in ("prompts", "images")
    ]
    status, out, error = in_process(
        *SMOKE, "reg=[ewc,replay,gradproj]", "reg.ewc.num_batches=2", *small
    )
    assert status == 0, error
    step = run_directory(out, tmp_path) / "steps" / "02"
    record = json.loads((step / "step.json").read_text())["training"]["regularizers"]
    assert record["ewc"]["prompts"] == record["replay"]["prompts"] == 6
    assert record["ewc"]["fisher_mean"] > 0
    header = (step / "training.csv").read_text().splitlines()[0]
    assert {"ewc_penalty", "replay_penalty"} <= set(header.split(","))
