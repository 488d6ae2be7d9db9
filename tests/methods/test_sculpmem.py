"""SculpMem: choosing and exchanging masks, the schedule, and that what is shut does not move."""

import dataclasses
import math

import pytest
import torch
from conftest import ended_after, run_directory
from torch import nn

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
        scope, request=dataclasses.replace(scope.request, index=2, plan="simultaneous")
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


# -------------------------------------------------------------------------------- released schedule
SHAPES = {"a": (6, 5), "b": (7,), "c": (2, 3, 2)}
LR, DECAY, BETAS = 1e-2, 0.1, (0.9, 0.99)


def scripted_gradients(steps: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        for _ in range(steps)
    ]


def start_weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


class Script:
    """What the method made of the scripted gradients: weights and masks after every step."""

    def __init__(self, scope, method: SculpMem, steps: int, script) -> None:
        params = {name: nn.Parameter(weight) for name, weight in start_weights().items()}
        scope = dataclasses.replace(
            scope,
            params=params,
            train=dataclasses.replace(scope.train, steps=steps, batch_size=4),
        )
        method.begin_request(scope)
        optimizer = torch.optim.AdamW(params.values(), lr=LR, betas=BETAS, weight_decay=DECAY)
        self.weights, self.masks = [snapshot(params)], [{}]
        for gradients in script[:steps]:
            for name, parameter in params.items():
                parameter.grad = gradients[name].clone()
            method.on_gradients(params)
            method.update(scope, optimizer)
            self.weights.append(snapshot(params))
            self.masks.append(dict(method._masks))
        self.record = method.end_request(scope)

    def exchanges(self) -> list[int]:
        """The steps after which a mask is another one than before."""
        return [
            step
            for step in range(1, len(self.masks))
            if self.masks[step - 1]
            and any(not torch.equal(self.masks[step][n], self.masks[step - 1][n]) for n in SHAPES)
        ]


def top(size: torch.Tensor, count: int) -> list[int]:
    return size.argsort(descending=True, stable=True)[:count].tolist()


def plain(script, steps: int, mask: str, schedule: str, warmup, interval, exchanged, epoch_steps):
    """The released loop, AdamW by its formula; weights and masks after every step."""
    weights = start_weights()
    first, second = ({n: torch.zeros(s) for n, s in SHAPES.items()} for _ in range(2))
    gathered, active = {n: torch.zeros(s).flatten() for n, s in SHAPES.items()}, {}
    history, made = [dict(weights)], [{}]
    epochs, taken = math.ceil(steps / epoch_steps), 0
    for step in range(1, steps + 1):
        moves = not (schedule == "epochs" and step == warmup)
        taken += moves
        for name, gradient in script[step - 1].items():
            gathered[name] = gathered[name] + gradient.flatten()
            open_ = torch.ones_like(gradient)
            if active:
                open_ = torch.zeros(gradient.numel())
                open_[sorted(active[name])] = 1
                open_ = open_.view_as(gradient)
            if not moves:
                continue
            masked = gradient * open_
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * masked
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * masked**2
            step_size = LR / (1 - BETAS[0] ** taken)
            deviation = (second[name] / (1 - BETAS[1] ** taken)).sqrt() + 1e-8
            moved = weights[name] * (1 - LR * DECAY) - step_size * first[name] / deviation
            free = open_ == 1 if mask == "update" else torch.ones_like(open_, dtype=torch.bool)
            weights[name] = torch.where(free, moved, weights[name])
        if step == warmup:
            active = {n: set(top(G.abs(), len(G) // 2)) for n, G in gathered.items()}
        elif step > warmup and step % interval == 0:
            if schedule == "epochs":
                epoch = math.floor((step - 1) / epoch_steps)
                progress, on = epoch / epochs, epoch < int(epochs * 0.8)
            else:
                progress, on = step / steps, step < 0.8 * steps
            fraction = exchanged * 0.5 * (1 + math.cos(math.pi * progress))
            for name, G in gathered.items() if on else ():
                size, inside = G.abs(), sorted(active[name])
                outside = [i for i in range(len(G)) if i not in active[name]]
                count = int(fraction * len(inside))
                if schedule == "epochs":
                    count = max(count, 1)
                leaving = sorted(inside, key=lambda i: size[i].item())[:count]
                entering = sorted(outside, key=lambda i: -size[i].item())[:count]
                active[name] = active[name] - set(leaving) | set(entering)
        if step == warmup or (step > warmup and step % interval == 0 and on):
            gathered = {name: torch.zeros_like(G) for name, G in gathered.items()}
        history.append(dict(weights))
        made.append({name: set(indices) for name, indices in active.items()})
    return history, made


@pytest.mark.parametrize("schedule", ["steps", "epochs"])
@pytest.mark.parametrize("mask", ["gradient", "update"])
def test_a_script_of_gradients_against_a_plain_loop(make_scope, mask, schedule):
    """30 steps, epochs of 4: warm-up 5, exchanges at multiples of 3, some of them of one entry."""
    steps, script = 30, scripted_gradients(30)
    method = SculpMem(
        warmup=5, interval=3, exchanged=0.6, num_anchors=15, mask=mask, schedule=schedule
    )
    found = Script(make_scope(), method, steps, script)
    history, made = plain(script, steps, mask, schedule, 5, 3, 0.6, epoch_steps=4)
    for step in range(steps + 1):
        active = {
            name: set(chosen.flatten().nonzero().flatten().tolist())
            for name, chosen in found.masks[step].items()
        }
        assert active == made[step], step
        for name, weight in history[step].items():
            torch.testing.assert_close(found.weights[step][name], weight, rtol=1e-5, atol=1e-6)
    # epochs of 8: int(6.4) = 6 of them exchange, so up to step 24; of steps: those below 24
    last = 24 if schedule == "epochs" else 21
    assert found.exchanges() == list(range(6, last + 1, 3))
    assert found.record == {"masked_fraction": 25 / 49, "exchanges": (last - 3) // 3}


def test_the_step_that_makes_the_first_mask_moves_nothing(make_scope):
    script = scripted_gradients(8)
    for schedule, still in (("epochs", [5]), ("steps", [])):
        method = SculpMem(warmup=5, interval=100, num_anchors=8, schedule=schedule)
        weights = Script(make_scope(), method, 8, script).weights
        assert [
            step
            for step in range(1, 9)
            if all(torch.equal(weights[step][name], weights[step - 1][name]) for name in SHAPES)
        ] == still


@pytest.mark.parametrize("mask", ["gradient", "update"])
def test_shut_entries_move_by_momentum_and_decay_or_not_at_all(make_scope, mask):
    """A torch AdamW on the masked gradients does the same to all of them, or to the active ones."""
    script = scripted_gradients(12)
    method = SculpMem(warmup=4, interval=100, num_anchors=8, mask=mask, schedule="epochs")
    found = Script(make_scope(), method, 12, script)
    other = {name: nn.Parameter(weight) for name, weight in start_weights().items()}
    optimizer = torch.optim.AdamW(other.values(), lr=LR, betas=BETAS, weight_decay=DECAY)
    for step, gradients in enumerate(script, start=1):
        shut = {name: ~chosen for name, chosen in found.masks[step - 1].items()}
        for name, parameter in other.items():
            parameter.grad = gradients[name].clone()
            if shut:
                parameter.grad[shut[name]] = 0.0
        if step != 4:
            optimizer.step()
        for name, parameter in other.items():
            now, before = found.weights[step][name], found.weights[step - 1][name]
            if mask == "update" and shut:
                assert torch.equal(now[shut[name]], before[shut[name]])
                assert not (now == before)[~shut[name]].any()
                with torch.no_grad():
                    parameter[shut[name]] = before[shut[name]]
            elif shut:
                assert not (now == before)[shut[name]].any()
            assert torch.equal(now, parameter)


@pytest.mark.parametrize(("steps", "last"), [(1000, 800), (2000, 1600)])
def test_the_presets_exchange_every_100_steps_to_80_percent(make_scope, steps, last):
    script = scripted_gradients(20)
    method = SculpMem(mask="gradient", schedule="epochs")  # warm-up 50, 200 anchors, batch 4
    assert (method.warmup, method.interval, method.until, method.num_anchors) == (50, 100, 0.8, 200)
    found = Script(make_scope(), method, steps, script * (steps // 20))
    assert found.exchanges() == list(range(100, last + 1, 100))
    assert found.record["exchanges"] == last // 100
    assert [bool(masks) for masks in found.masks] == [False] * 50 + [True] * (steps - 49)


def test_two_targets_have_epochs_twice_as_long(make_scope, sequence):
    """2 * 6 images in batches of 4 are 3 steps: of 12 steps 4 epochs, int(3.2) = 3 exchange."""
    scope = make_scope()
    both = dataclasses.replace(scope.request, index=2, plan="simultaneous")
    method = SculpMem(warmup=1, interval=1, num_anchors=6, schedule="epochs")
    found = Script(dataclasses.replace(scope, request=both), method, 12, scripted_gradients(12))
    assert found.exchanges() == list(range(2, 10))
    found = Script(scope, method, 12, scripted_gradients(12))  # 2 steps; int(4.8) = 4 of 6
    assert found.exchanges() == list(range(2, 9))


@pytest.mark.parametrize(
    ("loss_sum", "border", "begin_token"),
    [("channels", "kept", "trained"), ("mean", "masked", "trained"), ("mean", "kept", "detached")],
)
def test_the_options_of_conabl_reach_its_loss(make_scope, loss_sum, border, begin_token):
    scope = make_scope()
    options = {"loss_sum": loss_sum, "border": border, "begin_token": begin_token}
    method = SculpMem(loss="noise", num_anchors=4, warmup=1, **options)
    method.begin_request(scope)
    for parameter in scope.params.values():
        parameter.requires_grad_(True)
    batch, inner = method.batch(scope, 0), slice(1, -1) if border == "masked" else slice(None)
    loss, _ = method.loss(scope, batch)
    predicted = scope.model.predict(batch.noisy, batch.timesteps, batch.texts[1])
    error = (predicted - batch.wanted).square()[:, :, inner, inner]
    expected = error.sum(1).mean() if loss_sum == "channels" else error.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = zip(
        *(torch.autograd.grad(one, list(scope.params.values())) for one in (loss, expected)),
        strict=True,
    )
    same = [torch.allclose(one, other, rtol=1e-4, atol=1e-7) for one, other in pairs]
    assert all(same) == (begin_token == "trained")
