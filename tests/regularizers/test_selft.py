"""SelFT: the mask by hand, both ways of scoring, what may move, and its combinations."""

import dataclasses
import itertools
import json
import math

import diffusers
import pytest
import torch
from conftest import SMOKE, compose, run_directory
from doubles import Pull
from safetensors.torch import load_file

from cu_runner.concepts.requests import plan_requests
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.config.compose import parse
from cu_runner.methods.base import Method
from cu_runner.methods.conabl import ConAbl
from cu_runner.methods.esd import ESD
from cu_runner.methods.sculpmem import SculpMem
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import assign, select_parameters, snapshot, subtract
from cu_runner.models.sampling import sample_partly
from cu_runner.regularizers.gradproj import GradProj
from cu_runner.regularizers.selft import SelFT, score_trajectory, topk_mask
from cu_runner.request.name_sources import NameSource
from cu_runner.request.scope import Scope
from cu_runner.runner.training import check_composition, erase
from cu_runner.runtime.seeding import RandomSource, image_noise
from cu_runner.schema.settings import Sampler

METHOD = ConAbl(num_anchors=4)
TENTH = 0.1


def trainable(scope):
    for parameter in scope.params.values():
        parameter.requires_grad_(True)
    METHOD.begin_request(scope)
    return scope


def size(scope) -> int:
    return sum(parameter.numel() for parameter in scope.params.values())


# ---------------------------------------------------------------------------------------- topk_mask
def listed(mask: dict) -> dict:
    return {name: values.tolist() for name, values in mask.items()}


def test_mask_by_hand():
    """|theta * grad| = 2 6 | 4 0 5: the top 60% of all five, not of each tensor."""
    params = {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([[4.0, 9.0, 0.5]])}
    grads = {"a": torch.tensor([2.0, 2.0]), "b": torch.tensor([[-1.0, 0.0, 10.0]])}
    mask = topk_mask(params, grads, 0.6)
    assert listed(mask) == {"a": [False, True], "b": [[True, False, True]]}
    assert all(
        values.dtype == torch.bool and values.shape == params[name].shape
        for name, values in mask.items()
    )
    assert listed(topk_mask(params, grads, 0.39)) == {
        "a": [False, True],
        "b": [[False, False, False]],
    }
    assert listed(topk_mask(params, grads, 0.0)) == {
        "a": [False, False],
        "b": [[False, False, False]],
    }
    assert listed(topk_mask(params, grads, 1.0)) == {"a": [True, True], "b": [[True, True, True]]}


def test_of_equally_important_elements_the_first_are_chosen():
    params, zeros = (
        {"a": torch.ones(2), "b": torch.ones(2, 2)},
        {"a": torch.zeros(2), "b": torch.zeros(2, 2)},
    )
    assert listed(topk_mask(params, zeros, 0.5)) == {
        "a": [True, True],
        "b": [[True, False], [False, False]],
    }
    grads = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[-1.0, 1.0], [3.0, -1.0]])}
    assert listed(topk_mask(params, grads, 0.7)) == {
        "a": [True, True],
        "b": [[True, False], [True, False]],
    }


@pytest.mark.parametrize("fraction", [0.0, 1e-4, 0.05, 0.3, 0.9999, 1.0])
def test_exactly_floor_of_the_fraction_and_the_largest(fraction):
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (17, 9), "b": (30,), "c": (4, 5, 6)}
    params = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    grads = {
        name: torch.randn(shape, generator=draw).round() for name, shape in shapes.items()
    }  # many zeros
    mask = topk_mask(params, grads, fraction)
    scores = torch.cat([(params[name] * grads[name]).abs().flatten() for name in shapes])
    count = math.floor(fraction * 303)
    expected = torch.zeros(303, dtype=torch.bool)
    expected[scores.argsort(descending=True, stable=True)[:count]] = True
    assert torch.equal(torch.cat([mask[name].flatten() for name in shapes]), expected)
    assert expected.sum() == count


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        topk_mask({"a": torch.ones(3)}, {"a": torch.tensor([0.0, value, 1.0])}, 0.5)


# ------------------------------------------------------------------------------------------ scoring
def test_loss_scoring_is_the_gradient_of_the_methods_first_batches(make_scope):
    scope = trainable(make_scope())
    before = snapshot(scope.params)
    regularizer = SelFT(TENTH, num_batches=3)
    record = regularizer.begin_request(scope, METHOD)
    assert record == {"kept": math.floor(TENTH * size(scope)), "of": size(scope)}
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in scope.params.values()
    )
    assert all(torch.equal(parameter, before[name]) for name, parameter in scope.params.items())

    losses = sum(
        METHOD.loss(scope, batch)[0] for batch in (METHOD.batch(scope, step) for step in range(3))
    )
    grads = dict(
        zip(scope.params, torch.autograd.grad(losses, list(scope.params.values())), strict=True)
    )
    expected = topk_mask(scope.params, grads, TENTH)
    differing = sum((regularizer._mask[name] != expected[name]).sum().item() for name in expected)
    assert differing <= 4  # sums in another order may swap elements at the threshold


@pytest.mark.parametrize("scoring", ["loss", "trajectory"])
def test_a_mask_can_be_chosen_without_being_used(make_scope, scoring):
    scope = trainable(make_scope())
    used, idle = (SelFT(TENTH, scoring, num_batches=2, steps=2) for _ in range(2))
    mask = idle.choose(scope, METHOD)
    assert "_mask" not in vars(idle)
    assert all(parameter.grad is None for parameter in scope.params.values())
    record = used.begin_request(scope, METHOD)
    assert record["kept"] == sum(int(part.sum()) for part in mask.values())
    assert all(torch.equal(mask[name], part) for name, part in used._mask.items())


def test_trajectory_scoring_by_hand(make_scope):
    """Three DDIM steps: fresh noise for each, c* with guidance 3, the summed squared distance to
    the anchor's prediction.
    """
    scope = trainable(make_scope())
    before = snapshot(scope.params)
    score_trajectory(scope, METHOD, 3, "training")
    found = {name: parameter.grad for name, parameter in scope.params.items()}
    assert all(torch.equal(parameter, before[name]) for name, parameter in scope.params.items())

    model, pairs, total = scope.model, scope.sequence.training_pairs(scope.request.targets[0]), 0.0
    for step, timestep in enumerate(
        (999, 666, 332)
    ):  # the embedded model spaces its timesteps from the end
        target, anchor = pairs[step]
        seed = torch.randint(2**62, (), generator=scope.rng.generator("selft", step)).item()
        noisy, at = sample_partly(model, [target], [seed], Sampler(3, 3.0, "DDIMScheduler"), step)
        assert at.item() == timestep
        with torch.no_grad():
            wanted = model.predict(noisy, at[None], model.encode_prompts([anchor]))
        total = (
            total
            + (model.predict(noisy, at[None], model.encode_prompts([target])) - wanted)
            .square()
            .sum()
        )
    expected = torch.autograd.grad(total, list(scope.params.values()))
    for gradient, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(
            gradient, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item()
        )


# Stable Diffusion 1 and 2 as published: their own sampler begins one timestep later.
PUBLISHED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "clip_sample": False,
}


@pytest.fixture(scope="module")
def small_pipelines(pipelines):
    """Of Stable Diffusion 1.5 and 2.1, loaded."""
    return {
        kind: load_model(str(pipelines[kind]), 64, Sampler(3, 5.0))
        for kind in ("sd15", "sd21_base")
    }


@pytest.fixture
def released_scope(small_pipelines, settings):
    """Returns make(kind) -> a request for Van_Gogh on a small pipeline; its anchor is "a boat"."""

    def make(kind: str = "sd15") -> Scope:
        sequence = make_sequence(
            name="released",
            domain="style",
            cross_domain="object",
            targets=["Van_Gogh"],
            retain=["Rust"],
            cross_retain=["Sea"],
            vocabulary=[],
            prompt="A {object} image in {style} style",
            target_prompt=["In {concept} Style, {caption}", "{caption}, in {concept} Style."],
            anchor_prompt="{caption}",
            captions=["An old bridge.", "a red tree"],
            seeds=[1],
            anchors={"Van_Gogh": "a boat"},
            bare_prompt="{concept} Style",
        )
        model = small_pipelines[kind]
        params = select_parameters(model.denoiser, "kv_xattn")
        for parameter in params.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        return Scope(
            model=model,
            sequence=sequence,
            request=plan_requests(sequence, "sequential")[0],
            params=params,
            start=snapshot(params),
            base=snapshot(params),
            rng=RandomSource(0, 1),
            train=settings(),
            anchors=lambda prompts, number, mirrored=False: torch.zeros(number, 4, 8, 8),
        )

    return make


def scored_by_hand(scope, steps: int, pairs, loss, offset: int = 0, detached: bool = False):
    """The gradient along DDIM's trajectory with guidance 3, by UNet and diffusers' scheduler."""
    model, unet = scope.model, scope.model.denoiser
    readers = [
        layer for name, layer in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]

    def text_of(prompt: str) -> torch.Tensor:
        ids = model.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        return model.text_encoders[0](ids)[0]

    def constant_first_row(layer):
        return lambda text: torch.cat(
            [text[:, :1] @ layer.weight.detach().T, text[:, 1:] @ layer.weight.T], dim=1
        )

    scheduler = diffusers.DDIMScheduler(**PUBLISHED, steps_offset=offset)
    scheduler.set_timesteps(steps)
    total = 0.0
    for step in range(steps):
        target, anchor = pairs[step % len(pairs)]
        seed = torch.randint(2**62, (), generator=scope.rng.generator("selft", step)).item()
        x = image_noise([target], [seed], (4, 8, 8))
        with torch.no_grad():
            c, other, null = (text_of(prompt) for prompt in (target, anchor, ""))
            for t in scheduler.timesteps[:step]:
                without, given = (unet(x, t, text).sample for text in (null, c))
                x = scheduler.step(without + 3 * (given - without), t, x).prev_sample
            t = scheduler.timesteps[step]
            wanted, empty = (unet(x, t, text).sample for text in (other, null))
        for layer in readers if detached else ():
            layer.forward = constant_first_row(layer)
        total = total + loss(unet(x, t, c).sample, wanted, empty)
        for layer in readers if detached else ():
            del layer.forward
    return flat(torch.autograd.grad(total, list(scope.params.values())))


def flat(gradients) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def scored(scope, method, steps: int, prompts: str) -> torch.Tensor:
    score_trajectory(scope, method, steps, prompts)
    found = flat(parameter.grad for parameter in scope.params.values()).clone()
    for parameter in scope.params.values():
        parameter.grad = None
    return found


BARE = [("Van Gogh Style", "a boat")]
TRAINING = [
    ("In Van Gogh Style, an old bridge.", "An old bridge."),
    ("a red tree, in Van Gogh Style.", "a red tree"),
]


def to_anchor(concept, anchor, empty):
    return (concept - anchor).square().sum()


def to_empty(concept, anchor, empty):
    return (concept - empty).square().mean()


@pytest.mark.parametrize(
    ("kind", "method", "prompts", "pairs", "loss", "detached"),
    [
        ("sd15", ConAbl(), "bare", BARE, to_anchor, False),
        ("sd15", ConAbl(), "training", TRAINING, to_anchor, False),
        ("sd15", ConAbl(begin_token="detached"), "bare", BARE, to_anchor, True),
        ("sd15", SculpMem(begin_token="detached"), "training", TRAINING, to_anchor, True),
        ("sd15", Pull(), "bare", BARE, to_anchor, False),
        ("sd15", ESD(eta=2.0), "bare", BARE, to_empty, False),
        ("sd21_base", ConAbl(loss_sum="channels", border="masked"), "bare", BARE, to_anchor, False),
    ],
)
def test_released_scoring_by_hand(released_scope, kind, method, prompts, pairs, loss, detached):
    """DDIM without an offset; ESD by its own loss, the others by ConAbl's, summed."""
    scope = released_scope(kind)
    found = scored(scope, method, 3, prompts)
    expected = scored_by_hand(scope, 3, pairs, loss, detached=detached)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert all(torch.equal(weight, scope.start[name]) for name, weight in scope.params.items())


def test_what_the_released_scoring_fixes_matters(released_scope):
    """Timesteps, prompts, begin token and loss: with another of them it is another gradient."""
    scope = released_scope()
    gradients = [
        scored_by_hand(scope, 2, BARE, to_anchor),
        scored_by_hand(scope, 2, BARE, to_anchor, offset=1),
        scored_by_hand(scope, 2, BARE, to_anchor, detached=True),
        scored_by_hand(scope, 2, TRAINING, to_anchor),
        scored_by_hand(scope, 2, BARE, to_empty),
    ]
    for one, other in itertools.combinations(gradients, 2):
        assert (one - other).norm() > 0.01 * max(one.norm(), other.norm())


@pytest.mark.parametrize("kind", ["sd15", "sd21_base"])
def test_scored_timesteps_have_no_offset_where_those_of_images_have_one(small_pipelines, kind):
    model, sampler = small_pipelines[kind], Sampler(4, 3.0, "DDIMScheduler")
    reached = [
        [sample_partly(model, ["x"], [1], sampler, stop, **offset)[1].item() for stop in range(4)]
        for offset in ({"steps_offset": 0}, {})
    ]
    assert reached == [[750, 500, 250, 0], [751, 501, 251, 1]]
    scheduler = diffusers.DDIMScheduler(**PUBLISHED, steps_offset=0)
    scheduler.set_timesteps(4)
    assert reached[0] == scheduler.timesteps.tolist()


def test_scorings_choose_different_weights_and_repeat_themselves(make_scope):
    scope = trainable(make_scope())
    masks = []
    for scoring in ("loss", "trajectory", "loss", "trajectory"):
        regularizer = SelFT(TENTH, scoring, 2, 2)
        assert regularizer.begin_request(scope, METHOD)["kept"] == math.floor(TENTH * size(scope))
        masks.append(torch.cat([mask.flatten() for mask in regularizer._mask.values()]))
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("scoring", ["loss", "trajectory"])
def test_one_mask_for_all_targets_of_a_simultaneous_request(make_scope, settings, scoring):
    one, both = make_scope(), make_scope()
    both = dataclasses.replace(both, request=plan_requests(both.sequence, "simultaneous")[1])
    assert len(both.request.targets) == 2
    masks = []
    for scope in (one, both):
        regularizer = SelFT(TENTH, scoring, 2, 2, "update")
        report = erase(scope, ConAbl(num_anchors=4), {"selft": regularizer}, settings(steps=2))
        assert report.regularizers["selft"]["kept"] == math.floor(TENTH * size(scope))
        moved = subtract(scope.params, scope.start)
        assert not any(
            (change != 0)[~regularizer._mask[name]].any() for name, change in moved.items()
        )
        masks.append(torch.cat([mask.flatten() for mask in regularizer._mask.values()]))
        assign(scope.params, scope.base)
    assert not torch.equal(*masks)


class Closed(Method[None]):
    """Sets weights at once."""

    closed_form = True

    def batch(self, scope, step):
        return None

    def backward(self, scope, batch):
        return {"loss": 0.0}

    @torch.no_grad()
    def update(self, scope, optimizer):
        for parameter in scope.params.values():
            parameter.add_(1.0)


def test_a_method_in_closed_form_has_no_loss_to_score_by(make_scope, settings):
    scope = make_scope()
    with pytest.raises(ValueError, match=r"use reg\.selft\.scoring=trajectory"):
        SelFT(TENTH, apply="update").begin_request(scope, Closed())
    with pytest.raises(ValueError, match="acts on the gradient"):
        check_composition(Closed(), {"selft": SelFT(TENTH, "trajectory")})
    check_composition(Closed(), {"selft": SelFT(TENTH, "trajectory", apply="update")})
    report = erase(
        scope, Closed(), {"selft": SelFT(TENTH, "trajectory", steps=2, apply="update")}, settings()
    )
    moved = sum(
        (change != 0).sum().item() for change in subtract(scope.params, scope.start).values()
    )
    assert moved == report.regularizers["selft"]["kept"] == math.floor(TENTH * size(scope))


# --------------------------------------------------------------------------------------- what moves
@pytest.mark.parametrize(("apply", "stage"), [("gradient", "gradient"), ("update", "step")])
def test_stage(apply, stage):
    assert SelFT(TENTH, apply=apply).acts_on == (stage,)


@pytest.mark.parametrize("fraction", [0.0, TENTH, 1.0])
def test_update_leaves_masked_weights_bitwise_where_they_were(make_scope, settings, fraction):
    scope = make_scope()
    regularizer = SelFT(fraction, num_batches=2, apply="update")
    erase(scope, METHOD, {"selft": regularizer}, settings(weight_decay=0.1))
    for name, parameter in scope.params.items():
        free = regularizer._mask[name]
        assert torch.equal(parameter[~free], scope.start[name][~free])
        assert (parameter[free] != scope.start[name][free]).double().mean() > 0.99 or not free.any()


def test_the_masked_gradient_is_exact_and_weight_decay_moves_what_it_masks(make_scope, settings):
    scope = make_scope()
    regularizer = SelFT(TENTH, num_batches=2)
    erase(scope, METHOD, {"selft": regularizer}, settings(steps=1, lr=1e-3, weight_decay=0.1))
    for name, parameter in scope.params.items():
        shut = ~regularizer._mask[name]
        torch.testing.assert_close(
            parameter[shut], scope.start[name][shut] * (1 - 1e-4), rtol=1e-6, atol=0
        )  # 1 - lr * decay
        parameter.grad = torch.ones_like(parameter)
    regularizer.on_gradients(scope.params)
    assert all(
        torch.equal(parameter.grad, regularizer._mask[name].float())
        for name, parameter in scope.params.items()
    )


def test_everything_kept_is_plain_training(make_scope, settings):
    scope = make_scope()
    ends = []
    for regularizers in (
        {},
        {"selft": SelFT(1.0, num_batches=2)},
        {"selft": SelFT(1.0, num_batches=2, apply="update")},
    ):
        assign(scope.params, scope.base)
        erase(scope, METHOD, regularizers, settings())
        ends.append(snapshot(scope.params))
    assert all(torch.equal(ends[0][name], other[name]) for other in ends[1:] for name in ends[0])


@pytest.mark.parametrize("group", ["xattn", "full"])
def test_all_parameter_groups(make_scope, settings, group):
    scope = make_scope(group=group)
    regularizer = SelFT(0.01, num_batches=1, apply="update")
    report = erase(
        scope, ConAbl(num_anchors=4, params=group), {"selft": regularizer}, settings(steps=1)
    )
    assert report.regularizers["selft"] == {
        "kept": math.floor(0.01 * size(scope)),
        "of": size(scope),
    }
    assert sum(
        (change != 0).sum().item() for change in subtract(scope.params, scope.start).values()
    ) <= 0.01 * size(scope)


def test_nothing_of_a_request_is_left_for_the_next(make_scope, settings):
    second = make_scope(request=2)
    used = ConAbl(num_anchors=4), {"selft": SelFT(TENTH, num_batches=2, apply="update")}
    erase(make_scope(request=1), *used, settings())
    ends = []
    for method, regularizers in (
        used,
        (ConAbl(num_anchors=4), {"selft": SelFT(TENTH, num_batches=2, apply="update")}),
    ):
        assign(second.params, second.base)
        erase(second, method, regularizers, settings())
        ends.append(snapshot(second.params))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# ------------------------------------------------------------------------------------- combinations
def test_only_the_last_of_mask_and_projection_is_exact(make_scope, settings):
    scope = make_scope()
    for order in (("selft", "gradproj"), ("gradproj", "selft")):
        assign(scope.params, scope.base)
        made = {
            "selft": SelFT(TENTH, num_batches=2, apply="update"),
            "gradproj": GradProj("update", NameSource(number=8)),
        }
        erase(scope, METHOD, {name: made[name] for name in order}, settings())
        moved = subtract(scope.params, scope.start)
        P = made["gradproj"]._projector
        masked = sum(
            (change != 0)[~made["selft"]._mask[name]].sum().item() for name, change in moved.items()
        )
        outside = max((change - change @ P).norm() / change.norm() for change in moved.values())
        assert (masked == 0, outside < 1e-4) == (
            (False, True) if order[-1] == "gradproj" else (True, False)
        )


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("selft_gradproj", "selft,gradproj"),
        ("gradproj_l1", "gradproj,l1"),
        ("gradproj_merge", "gradproj,merge"),
    ],
)
def test_a_file_of_two_is_the_list_of_two(file, names):
    one, list_of_two = (
        parse(compose("sequence=smoke", f"reg={choice}")) for choice in (file, f"[{names}]")
    )
    assert one.signature == list_of_two.signature
    assert list(one.regularizers) == names.split(",")
    assert one.directory.name.startswith(f"conabl-{names.replace(',', '+')}-")


def test_a_tuned_cell_of_two_reaches_both(tmp_path):
    (tmp_path / "tuned").mkdir()
    cell = (
        "conabl:\n  selft+gradproj:\n    reg.selft.fraction: 0.3\n    reg.gradproj.apply: update\n"
    )
    (tmp_path / "tuned/smoke.yaml").write_text(cell)
    plan = parse(
        compose(f"hydra.searchpath=[file://{tmp_path}]", "sequence=smoke", "reg=selft_gradproj")
    )
    assert plan.regularizers["selft"].arguments["fraction"] == 0.3
    assert plan.regularizers["gradproj"].arguments["apply"] == "update"


@pytest.mark.parametrize("file", ["selft_gradproj", "gradproj_l1"])
def test_combinations_run(in_process, filled_cache, tmp_path, file):
    small = ["reg.selft.num_batches=2"] if "selft" in file else []
    status, out, err = in_process(*SMOKE, f"reg={file}", "reg.gradproj.auxiliary.number=8", *small)
    assert (status, err) == (0, "")
    for request in (1, 2):
        step = run_directory(out, tmp_path) / f"steps/0{request}"
        weights = load_file(step / "delta.safetensors")
        assert all(
            change.isfinite().all() and change.abs().sum() > 0 for change in weights.values()
        )
        record = json.loads((step / "step.json").read_text())["training"]["regularizers"]
        assert record["gradproj"]["rank"] > 0
        if "selft" in file:
            n = sum(change.numel() for change in weights.values())
            assert record["selft"] == {"kept": math.floor(0.6 * n), "of": n}  # conf/training


def test_bad_fraction_is_one_line(in_process):
    status, _, err = in_process(*SMOKE, "reg=selft", "reg.selft.fraction=1.5")
    assert (status, err) == (
        2,
        "cu-run: reg.selft.fraction=1.5: input should be less than or equal to 1\n",
    )
