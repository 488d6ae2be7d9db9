"""SculpMem: choosing and exchanging masks, the schedule, and that what is shut does not move."""

import dataclasses

import pytest
import torch
from conftest import ended_after, run_directory

from cu_runner.methods.conabl import ConAbl
from cu_runner.methods.sculpmem import SculpMem, exchange, keep_top, turnover
from cu_runner.models.parameters import assign, snapshot
from cu_runner.runner.training import erase

OPTIONS = {"num_anchors": 4, "warmup": 2, "interval": 2}


# -------------------------------------------------------------------------------------------- masks
def test_keep_top_takes_the_largest_magnitudes():
    gathered = torch.tensor([[-4.0, 1.0, 0.5], [3.0, -2.0, 0.0]])
    assert keep_top(gathered, 0.5).tolist() == [[True, False, False], [True, True, False]]
    assert keep_top(gathered, 0.34).int().sum() == 2  # floor(2.04)
    assert keep_top(gathered, 0.33).int().sum() == 1  # floor(1.98)
    assert not keep_top(gathered, 0.0).any()
    assert keep_top(gathered, 1.0).all()


def test_keep_top_takes_the_first_of_equals():
    assert keep_top(torch.tensor([1.0, -1.0, 1.0, 1.0]), 0.5).tolist() == [True, True, False, False]
    assert keep_top(torch.zeros(5), 0.6).tolist() == [True, True, True, False, False]


def test_exchange_drops_the_smallest_active_for_the_largest_inactive():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    gathered = torch.tensor([[5.0, -0.1, 2.0], [-0.2, -9.0, 0.3]])
    assert exchange(mask, gathered, 0.0).equal(mask)
    assert exchange(mask, gathered, 0.24).equal(mask)  # floor(0.96)
    assert exchange(mask, gathered, 0.25).tolist() == [[True, False, True], [True, True, False]]
    assert exchange(mask, gathered, 0.5).tolist() == [[True, False, True], [False, True, True]]
    # only two are inactive: two are exchanged
    assert exchange(mask, gathered, 1.0).equal(exchange(mask, gathered, 0.5))
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_exchange_of_all_swaps_halves_and_takes_the_first_of_equals():
    mask = torch.tensor([True, True, False, False])
    assert exchange(mask, torch.zeros(4), 1.0).tolist() == [False, False, True, True]
    assert exchange(mask, torch.ones(4), 0.5).tolist() == [False, True, True, False]
    for full in (torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)):
        assert exchange(full, torch.randn(3), 1.0).equal(full)


def test_exchange_keeps_the_number_of_active_entries():
    draw = torch.Generator().manual_seed(0)
    gathered = torch.randn(40, 25, generator=draw)
    mask = keep_top(torch.randn(40, 25, generator=draw), 0.5)
    for fraction in (0.1, 0.5, 1.0):
        changed = exchange(mask, gathered, fraction)
        assert changed.sum() == mask.sum() == 500
        assert (changed != mask).sum() == 2 * int(fraction * 500)


def test_turnover_falls_along_a_cosine():
    assert turnover(0.2, 0.0) == pytest.approx(0.2)
    assert turnover(0.2, 0.5) == pytest.approx(0.1)
    assert turnover(0.2, 1 / 3) == pytest.approx(0.15)
    assert turnover(0.2, 1.0) == pytest.approx(0.0)


# ------------------------------------------------------------------------------------------- update
class Watched(SculpMem):
    """Notes the weights before and after every step, the gradients gathered, and the mask of the
    step.
    """

    def begin_request(self, scope):
        super().begin_request(scope)
        self.steps = []

    def on_gradients(self, params):
        raw = {name: parameter.grad.clone() for name, parameter in params.items()}
        super().on_gradients(params)
        self.steps.append(
            {
                "raw": raw,
                "masked": {name: parameter.grad.clone() for name, parameter in params.items()},
            }
        )

    def update(self, scope, optimizer):
        self.steps[-1] |= {"before": snapshot(scope.params), "mask": dict(self._masks)}
        super().update(scope, optimizer)
        self.steps[-1]["after"] = snapshot(scope.params)


@pytest.fixture
def watched(make_scope, settings):
    """A request of 10 steps with AdamW: 2 dense ones, exchanges after 4 and 6 (not 8: until is
    0.8).
    """
    method = Watched(exchanged=0.4, **OPTIONS)
    report = erase(make_scope(steps=10), method, {}, settings(steps=10, weight_decay=0.1))
    return method, report


def test_shut_entries_keep_their_value_bitwise_whatever_momentum_and_decay_do(watched):
    method, _ = watched
    for step in method.steps[2:]:
        for name, mask in step["mask"].items():
            assert torch.equal(step["after"][name][~mask], step["before"][name][~mask])
            assert (step["after"][name][mask] != step["before"][name][mask]).float().mean() > 0.99
            assert torch.equal(step["masked"][name], step["raw"][name] * mask)


def test_the_warm_up_is_dense(watched, make_scope, settings):
    method, _ = watched
    assert [bool(step["mask"]) for step in method.steps] == [False] * 2 + [True] * 8
    scope = make_scope()
    assign(scope.params, method.steps[0]["before"])
    erase(scope, ConAbl(num_anchors=4), {}, settings(steps=2, weight_decay=0.1))
    assert all(
        torch.equal(weight, method.steps[1]["after"][name]) for name, weight in scope.params.items()
    )


def test_masks_follow_the_gathered_signed_gradients(watched):
    method, _ = watched
    for name in method.steps[0]["raw"]:
        raw = [step["raw"][name] for step in method.steps]
        masks = [step["mask"].get(name) for step in method.steps]
        assert torch.equal(masks[2], keep_top(raw[0] + raw[1], 0.5))
        assert torch.equal(masks[3], masks[2])
        assert torch.equal(masks[4], exchange(masks[2], raw[2] + raw[3], turnover(0.4, 0.4)))
        assert torch.equal(masks[6], exchange(masks[4], raw[4] + raw[5], turnover(0.4, 0.6)))
        assert all(torch.equal(mask, masks[6]) for mask in masks[7:])
        assert not torch.equal(masks[2], masks[6])


def test_the_record_of_a_request(watched):
    _, report = watched
    assert report.method == {"masked_fraction": 0.5, "exchanges": 2}


def test_all_active_is_conabl_bitwise(make_scope, settings):
    results = []
    for method in (SculpMem(active=1.0, **OPTIONS), ConAbl(num_anchors=4)):
        scope = make_scope(steps=5)
        erase(scope, method, {}, settings(steps=5))
        results.append(snapshot(scope.params))
        assign(scope.params, scope.base)
    assert all(torch.equal(results[0][name], weight) for name, weight in results[1].items())


@pytest.mark.parametrize("group", ["xattn", "full"])
def test_every_tensor_of_a_group_has_its_own_mask(make_scope, settings, group):
    scope = make_scope(group=group, steps=3)
    method = Watched(params=group, num_anchors=4, warmup=1)
    erase(scope, method, {}, settings())
    mask = method.steps[2]["mask"]
    assert all(
        int(mask[name].sum()) == weight.numel() // 2 for name, weight in scope.params.items()
    )


def test_a_later_request_does_not_depend_on_an_earlier_one(make_scope, settings):
    used, fresh = SculpMem(**OPTIONS), SculpMem(**OPTIONS)
    scope = make_scope(steps=5)
    erase(scope, used, {}, settings(steps=5))
    results = []
    for method in (used, fresh):
        assign(scope.params, scope.base)
        second = make_scope(request=2, steps=5)
        erase(second, method, {}, settings(steps=5))
        results.append(snapshot(second.params))
    assert all(torch.equal(results[0][name], weight) for name, weight in results[1].items())


def test_a_warm_up_without_end_is_refused(make_scope):
    with pytest.raises(
        ValueError, match=r"^method.warmup=3: train.steps=3 leaves no step under a mask; lower it$"
    ):
        SculpMem(warmup=3).begin_request(make_scope(steps=3))


def test_a_request_that_ends_in_its_warm_up_was_dense(make_scope, settings):
    scope = make_scope(steps=9)
    report = erase(
        scope, SculpMem(num_anchors=4, warmup=5), {}, settings(steps=9), on_step=ended_after(2)
    )
    assert report.method == {"masked_fraction": 0.0, "exchanges": 0}


def test_both_targets_of_a_simultaneous_request(make_scope, settings, sequence):
    scope = make_scope(request=2, steps=3)
    both = dataclasses.replace(
        scope, request=dataclasses.replace(scope.request, targets=sequence.targets)
    )
    report = erase(both, SculpMem(num_anchors=4, warmup=1), {}, settings())
    assert len(report.logs) == 3


def test_two_requests_with_gradient_projection(in_process, filled_cache, tmp_path):
    status, out, err = in_process(
        "sequence=smoke",
        "method=sculpmem",
        "method.num_anchors=4",
        "method.warmup=1",
        "method.interval=1",
        "reg=gradproj",
        "train.steps=3",
        "train.batch_size=2",
        "model.sampler.steps=2",
        "wandb.mode=disabled",
        "num_threads=1",
    )
    assert status == 0, err
    assert (run_directory(out, tmp_path) / "metrics.csv").read_text().count(
        "\n"
    ) == 4  # header, base, two requests
