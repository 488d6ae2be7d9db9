"""The inner loop: order of hooks, AdamW, a loss that is not finite, regularizers that do not
commute.
"""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from conftest import ended_after
from doubles import Pull
from torch import Tensor, nn

from cu_runner.methods._forgetting import add_gradient
from cu_runner.methods.base import Method
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import assign, select_parameters, snapshot, subtract
from cu_runner.regularizers.base import Regularizer
from cu_runner.regularizers.gradproj import orthogonal_projector
from cu_runner.runner.early_stop import EarlyStop, LossLeft
from cu_runner.runner.training import Training, check_composition, erase
from cu_runner.schema.errors import TrainingError
from cu_runner.schema.settings import PlanSettings, Sampler


class Recorder(Regularizer):
    """Notes every call; its penalty is a constant."""

    def __init__(self, name: str, events: list[str], edits: bool = False) -> None:
        self.name, self.events = name, events
        self.acts_on = ("loss", "step") if edits else ("loss",)

    def begin_request(self, scope, method):
        self.events.append(f"{self.name}.begin")
        return {"name": self.name}

    def penalty(self, params):
        self.events.append(f"{self.name}.penalty")
        return 2.0 + 0 * next(iter(params.values())).sum()

    def on_gradients(self, params):
        assert all(parameter.grad is not None for parameter in params.values())
        self.events.append(f"{self.name}.on_gradients")

    def on_step(self, params, before):
        self.events.append(f"{self.name}.on_step {len(before)}")


class Mask(Regularizer):
    """Only the weights of some columns move."""

    acts_on = ("step",)

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    @torch.no_grad()
    def on_step(self, params, before):
        for name, parameter in params.items():
            parameter.copy_(before[name] + (parameter - before[name]) * self.mask)


class Project(Mask):
    """Steps are multiplied by a matrix from the right."""

    @torch.no_grad()
    def on_step(self, params, before):
        for name, parameter in params.items():
            parameter.copy_(before[name] + (parameter - before[name]) @ self.mask)


# -------------------------------------------------------------------------------------------- hooks
def test_order_of_hooks(make_scope, settings):
    events: list[str] = []
    regularizers = {"b": Recorder("b", events), "a": Recorder("a", events)}

    report = erase(
        make_scope(),
        Pull(events),
        regularizers,
        settings(steps=2),
        lambda training: events.append(f"step {training.done}"),
    )
    step = [
        "loss",
        "b.penalty",
        "a.penalty",
        "method.on_gradients",
        "b.on_gradients",
        "a.on_gradients",
        "b.on_step 0",
        "a.on_step 0",
    ]
    expected = [
        "method.begin",
        "b.begin",
        "a.begin",
        "batch 0",
        *step,
        "step 1",
        "batch 1",
        *step,
        "step 2",
    ]
    assert events == expected
    assert report.regularizers == {"b": {"name": "b"}, "a": {"name": "a"}}


def test_copies_of_the_weights_are_kept_for_regularizers_that_edit_the_step(make_scope, settings):
    events: list[str] = []
    scope = make_scope()
    erase(
        scope,
        Pull(),
        {"a": Recorder("a", events), "b": Recorder("b", events, edits=True)},
        settings(steps=1),
    )
    assert [event for event in events if "on_step" in event] == [
        f"{name}.on_step {len(scope.params)}" for name in "ab"
    ]


def test_penalties_are_added_and_logged(make_scope, settings):
    scope = make_scope()
    (plain,) = erase(scope, Pull(), {}, settings(steps=1)).logs
    assert plain == {"step": 1, "factor": 1.0, "loss": plain["loss"]}
    assign(scope.params, scope.base)
    (logs,) = erase(
        scope, Pull(), {"a": Recorder("a", []), "b": Recorder("b", [])}, settings(steps=1)
    ).logs
    assert logs == {
        "step": 1,
        "factor": 1.0,
        "a_penalty": 2.0,
        "b_penalty": 2.0,
        "loss": pytest.approx(plain["loss"] + 4),
    }


def test_a_request_may_end_early(make_scope, settings):
    report = erase(make_scope(), Pull(), {}, settings(steps=9), ended_after(4))
    assert [row["step"] for row in report.logs] == [1, 2, 3, 4]


def test_sgd_and_adam_by_hand(make_scope, settings):
    """One step: sgd moves by lr g; adam moves by lr g / |g| and decays through the gradient."""
    for optimizer, decay in (("sgd", 0.0), ("adam", 0.0), ("sgd", 0.5)):
        scope = make_scope()
        erase(scope, Pull(), {}, settings(steps=1, optimizer=optimizer, lr=0.1, weight_decay=decay))
        for name, weight in scope.params.items():
            start = scope.base[name]
            gradient = start - 1 + decay * start
            step = gradient if optimizer == "sgd" else gradient.sign()
            torch.testing.assert_close(weight.detach(), start - 0.1 * step, atol=1e-5, rtol=0)
        assign(scope.params, scope.base)


def test_early_stop_waits_for_its_interval_and_its_patience():
    values = iter([98.0, 99.0, 98.9, 99.0, 99.5])
    stop = EarlyStop(
        PlanSettings("simultaneous", 99.0, interval=10, patience=2), lambda: next(values)
    )
    assert [step for step in range(1, 60) if stop(step)] == [50]
    assert stop.seen == [
        {"step": 10 * i, "UA": value} for i, value in enumerate([98.0, 99.0, 98.9, 99.0, 99.5], 1)
    ]
    assert not EarlyStop(PlanSettings("simultaneous"), lambda: 100.0)(100)


def test_early_stop_takes_exactly_the_threshold():
    assert EarlyStop(PlanSettings("simultaneous", 99.0, interval=1), lambda: 99.0)(1)


def test_a_request_ends_when_its_loss_has_fallen():
    """Measured every other step; the UA is never asked for."""
    left = iter([0.9, 0.31, 0.3, 0.1])
    setting = PlanSettings("sequential", stop_loss=0.3, interval=2)
    stop = EarlyStop(setting, lambda: pytest.fail("UA was measured"), (), left.__next__)
    assert [step for step in range(1, 9) if stop(step)] == [6, 8]
    assert stop.seen[:2] == [{"step": 2, "loss_left": 0.9}, {"step": 4, "loss_left": 0.31}]


def test_the_loss_that_is_left_by_hand(make_scope):
    """Pull's loss is a sum of squares: of weights half way to 1 a fourth of it is left."""
    scope, method = make_scope(steps=3), Pull(factors=(1.0, 1.0, 1.0, 2.0, 3.0, 4.0))
    left = LossLeft(scope, method)
    assert left() == pytest.approx(1)
    with torch.no_grad():
        for parameter in scope.params.values():
            parameter.copy_((parameter + 1) / 2)
    assert left() == pytest.approx(0.25)
    assign(scope.params, scope.base)
    probes = [event for event in method.events if event.startswith("batch")]
    assert set(probes) == {"batch 3", "batch 4", "batch 5"}  # never trained on
    assert not any(parameter.grad is not None for parameter in scope.params.values())


def test_a_loss_below_0_has_no_fraction(make_scope):
    with pytest.raises(TrainingError, match=r"setting\.stop_loss: the method's loss on"):
        LossLeft(make_scope(), Pull(factors=(-1.0,)))()


def stops_at(uas, stop_at: float, interval: int, patience_steps: int) -> int | None:
    """The released loop: the step at which a request ends."""
    best, count = 0.0, 0
    for step, ua in zip(itertools.count(interval, interval), uas, strict=False):
        if ua > best:
            best, count = ua, 0
        else:
            count += interval
        if ua >= stop_at or count >= patience_steps:
            return step
    return None


def test_patience_in_steps_against_a_plain_loop():
    """Random UA, with repeats and zeros; also of a request that goes on after an interruption."""
    draw, ends = random.Random(0), []
    for _ in range(400):
        interval = draw.choice([1, 10, 100])
        stop_at, patience = draw.choice([50.0, 99.0]), interval * draw.randint(1, 14)
        # not always a multiple of the interval
        patience -= draw.choice([0, interval // 2])
        setting = PlanSettings("simultaneous", stop_at, interval=interval, patience_steps=patience)
        ceiling = draw.choice([0, 3, 60, 100])
        uas = [float(draw.randint(0, ceiling)) for _ in range(12)]
        expected = stops_at(uas, stop_at, interval, patience)
        steps = range(1, 12 * interval + 1)
        values = iter(uas)
        stop = EarlyStop(setting, lambda values=values: next(values))
        found = next((step for step in steps if stop(step)), None)
        assert found == expected
        ends.append("never" if expected is None else uas[expected // interval - 1] >= stop_at)
        # stopped after some steps, and begun again with what it had seen
        cut = interval * draw.randint(0, (expected or 12 * interval) // interval - 1)
        seen, rest = stop.seen[: cut // interval], iter(uas[cut // interval :])
        again = EarlyStop(setting, rest.__next__, seen)
        assert next((step for step in steps[cut:] if again(step)), None) == expected
    assert min(ends.count(end) for end in (True, False, "never")) > 20


def test_without_patience_in_steps_only_the_threshold_ends_a_request():
    stop = EarlyStop(PlanSettings("simultaneous", 99.0, interval=1), lambda: 0.0)
    assert not any(stop(step) for step in range(1, 500))


class Solve(Method[None]):
    """Sets every weight to 2, in one step and without a gradient."""

    closed_form = True

    def batch(self, scope, step):
        return None

    def backward(self, scope, batch):
        return {"loss": 7.0}

    def update(self, scope, optimizer):
        with torch.no_grad():
            for parameter in scope.params.values():
                parameter.fill_(2.0)

    def end_request(self, scope):
        return {"solved": True}


def test_a_closed_form_takes_one_step_that_regularizers_may_edit(make_scope, settings):
    scope = make_scope()
    keep = torch.arange(512) < 256
    report = erase(scope, Solve(), {"mask": Mask(keep.float())}, settings(steps=50))
    assert report.logs == [{"step": 1, "loss": 7.0}]
    assert report.method == {"solved": True}
    for name, weight in scope.params.items():
        torch.testing.assert_close(
            weight[:, keep], torch.full_like(weight[:, keep], 2.0), atol=1e-6, rtol=0
        )
        assert torch.equal(weight[:, ~keep], scope.base[name][:, ~keep])


def test_a_closed_form_has_no_loss_for_a_penalty():
    with pytest.raises(
        ValueError,
        match=(
            r"^reg=soft acts on the loss, and the method sets the weights in closed form "
            r"without one; "
        ),
    ):
        check_composition(Solve(), {"mask": Mask(torch.ones(1)), "soft": Recorder("soft", [])})
    check_composition(Pull(), {"soft": Recorder("soft", [])})
    check_composition(Solve(), {"mask": Mask(torch.ones(1))})


def test_only_the_weights_in_scope_change_and_no_gradient_is_left(make_scope, settings, model):
    scope = make_scope()
    others = snapshot(
        {
            name: weight
            for name, weight in model.denoiser.named_parameters()
            if name not in scope.params
        }
    )
    erase(scope, Pull(), {}, settings(steps=2))
    now = dict(model.denoiser.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in others.items())
    assert all(not torch.equal(now[name], before) for name, before in scope.base.items())
    assert not any(weight.requires_grad for weight in now.values())
    assert all(weight.grad is None for weight in scope.params.values())


# -------------------------------------------------------------------------------------------- AdamW
def adamw(
    weight: Tensor, factors, lr: float, betas: tuple[float, float], decay: float, clip: float = 0.0
) -> Tensor:
    """Loshchilov & Hutter 2019, Alg. 2, on 0.5 factor ||theta - 1||^2, in float64."""
    theta, m, v = weight.double(), 0.0, 0.0
    for t, factor in enumerate(factors, start=1):
        g = factor * (theta - 1)
        if clip:
            g = g * min(1.0, clip / (g.norm().item() + 1e-6))
        theta = theta * (1 - lr * decay)
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        theta = theta - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)
    return theta


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_by_hand(make_scope, settings, clip):
    factors, lr, betas, decay = (1.0, 3.0, 0.2, 1.5), 0.03, (0.8, 0.95), 0.1
    scope = make_scope()
    erase(
        scope,
        Pull(factors=factors),
        {},
        settings(steps=4, lr=lr, betas=betas, weight_decay=decay, grad_clip=clip),
    )
    flat = torch.cat([weight.flatten() for weight in scope.base.values()])
    found = torch.cat([weight.detach().flatten() for weight in scope.params.values()])
    expected = adamw(flat, factors, lr, betas, decay, clip)
    assert (found - expected).abs().max() < 2e-6
    assert (found - flat).abs().mean() > 0.05


# --------------------------------------------------------------------------------------- not finite
@pytest.mark.parametrize(("factor", "word"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_stops_and_says_where(make_scope, settings, factor, word):
    scope = make_scope(request=2)
    message = (
        rf"^training led to a loss of {word} at request 2 \(snow drift\), step 3 of 5; "
        "lower train.lr. "
        "Finished requests are kept$"
    )
    with pytest.raises(TrainingError, match=message):
        erase(scope, Pull(factors=(1.0, 1.0, factor)), {}, settings(steps=5))


def test_weights_that_the_last_step_ruins_are_refused(make_scope, settings):
    class Ruin(Regularizer):
        acts_on = ("step",)

        @torch.no_grad()
        def on_step(self, params, before):
            next(iter(params.values()))[0, 0] = math.nan

    with pytest.raises(TrainingError, match=r"request 1 \(torch light\), step 1 of 1"):
        erase(make_scope(), Pull(), {"ruin": Ruin()}, settings(steps=1))


# -------------------------------------------------------------------------------------------- order
def test_masking_and_projecting_do_not_commute(make_scope, settings):
    """One step d of AdamW becomes (d M) P or (d P) M, by the order of the list."""
    width = 512
    draw = torch.Generator().manual_seed(0)
    P = orthogonal_projector(torch.randn(width, 40, generator=draw))
    M = (torch.rand(width, generator=draw) < 0.3).float()
    scope, steps = make_scope(), {}
    for order in ("", "mask project", "project mask"):
        assign(scope.params, scope.base)
        known = {"mask": Mask(M), "project": Project(P)}
        erase(scope, Pull(), {name: known[name] for name in order.split()}, settings(steps=1))
        steps[order] = subtract(scope.params, scope.base)
    for name, d in steps[""].items():
        masked_first, projected_first = steps["mask project"][name], steps["project mask"][name]
        torch.testing.assert_close(masked_first, (d * M) @ P, atol=1e-6, rtol=0)
        torch.testing.assert_close(projected_first, (d @ P) * M, atol=1e-6, rtol=0)
        assert (masked_first - projected_first).norm() > 0.2 * projected_first.norm()
        assert projected_first[:, M == 0].abs().max() == 0


# ------------------------------------------------------------------------------------ memory layout
@pytest.fixture
def channels_last(make_scope):
    """A scope whose weights are all of a UNet in the layout that a GPU's convolutions are fastest
    in.
    """
    model = load_model("package:shapecanvas/weights/pipeline", 64, Sampler(2, 2.5))
    model.denoiser.to(memory_format=torch.channels_last)
    params = select_parameters(model.denoiser, "full")
    assert any(not parameter.is_contiguous() for parameter in params.values())
    return dataclasses.replace(
        make_scope(), model=model, params=params, start=snapshot(params), base=snapshot(params)
    )


def test_a_gradient_that_is_set_has_the_strides_of_its_weight(channels_last):
    params = channels_last.params
    flat = torch.arange(
        sum(parameter.numel() for parameter in params.values()), dtype=torch.float32
    )
    for times in (1, 2):
        add_gradient(params, flat)
        assert [parameter.grad.stride() for parameter in params.values()] == [
            parameter.stride() for parameter in params.values()
        ]
        assert torch.equal(
            torch.cat([parameter.grad.flatten() for parameter in params.values()]), times * flat
        )


def test_moments_get_the_strides_of_the_weights_when_a_request_goes_on(channels_last, settings):
    saved = []
    before = dataclasses.replace(
        channels_last,
        params={n: nn.Parameter(p.detach().contiguous()) for n, p in channels_last.params.items()},
    )
    erase(before, Pull(), {}, settings(steps=1), lambda training: saved.append(training.state()))
    after = Training(channels_last, Pull(), {}, settings(steps=2))
    after.restore(saved[0])
    moments = after.state()["optimizer"]["state"]
    for place, (name, parameter) in enumerate(channels_last.params.items()):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert moments[place][moment].stride() == parameter.stride(), name
            assert torch.equal(
                moments[place][moment], saved[0]["optimizer"]["state"][place][moment]
            )
