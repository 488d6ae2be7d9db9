"""The restricted gradient in closed form, truncation, and the three diversities of its prompts."""

import re

import pytest
import torch
from conftest import SMOKE, compose
from test_baselines import SMALL, diffusion, first_batch, recording, scope  # noqa: F401

from cu_runner.concepts.entries import read_shipped
from cu_runner.config.compose import parse
from cu_runner.methods._forgetting import flat_gradient, split
from cu_runner.methods.rgd import RGD, restricted_gradient, without_concept
from cu_runner.models.parameters import snapshot
from cu_runner.runtime.paths import config_dir

SHIPPED = ("scenes_with_concept", "people_with_concept")


def vector(*entries: float) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.float64)


# ------------------------------------------------------------------------------ restricted gradient
@pytest.mark.parametrize(
    ("g_forget", "g_retain", "alpha", "always", "expected"),
    [
        # g_f.g_r = -1, ||g_f||^2 = 1, ||g_r||^2 = 2: d_f = (1, 0) + (-1, 1) / 2, d_r = (-1, 1) +
        # (1, 0)
        ((1, 0), (-1, 1), 1.0, False, (0.5, 1.5)),
        ((1, 0), (-1, 1), 2.0, False, (0.5, 2.5)),
        ((1, 0), (-1, 1), 0.0, True, (0.5, 0.5)),
        ((1, 0), (1, 1), 2.0, False, (3, 2)),  # they agree: as they are
        ((1, 0), (1, 1), 2.0, True, (0.5, 1.5)),  # d_f = (1, 0) - (1, 1) / 2, d_r = (1, 1) - (1, 0)
        ((2, 0), (0, 3), 1.5, True, (2, 4.5)),  # orthogonal
        ((1, 2), (-2, -4), 1.0, False, (0, 0)),  # opposite: nothing is left
        ((0, 0), (3, 4), 1.5, False, (4.5, 6)),
        ((0, 0), (3, 4), 1.5, True, (4.5, 6)),
        ((3, 4), (0, 0), 1.5, True, (3, 4)),
        ((0, 0), (0, 0), 1.5, True, (0, 0)),
    ],
)
def test_closed_form(g_forget, g_retain, alpha, always, expected):
    found = restricted_gradient(vector(*g_forget), vector(*g_retain), alpha, always)
    torch.testing.assert_close(found, vector(*expected), atol=1e-12, rtol=0)


def test_the_defaults_are_alpha_one_and_projection_of_conflicts_only():
    torch.testing.assert_close(restricted_gradient(vector(1, 0), vector(-1, 1)), vector(0.5, 1.5))
    torch.testing.assert_close(restricted_gradient(vector(1, 0), vector(1, 1)), vector(2, 1))


@pytest.mark.parametrize("always", [False, True])
def test_neither_loss_rises_to_first_order(always):
    draw, conflicts = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        g_forget, g_retain = torch.randn(2, 6, generator=draw, dtype=torch.float64)
        found = restricted_gradient(g_forget, g_retain, 1.5, always)
        assert found @ g_forget >= -1e-9
        assert found @ g_retain >= -1e-9
        conflicts += (g_forget @ g_retain < 0).item()
    assert 50 < conflicts < 150


def test_both_projections_are_from_the_original_gradients():
    """<d_f, g_r> = <d_r, g_f> = 0; d_f itself keeps a component along d_r, which a second
    projection after the first would not.
    """
    g_forget, g_retain = vector(1, 0, 0), vector(-1, 2, 0)
    d_forget = restricted_gradient(g_forget, g_retain, 0.0)
    d_retain = restricted_gradient(g_forget, g_retain, 1.0) - d_forget
    assert d_forget @ g_retain == pytest.approx(0, abs=1e-12)
    assert d_retain @ g_forget == pytest.approx(0, abs=1e-12)
    assert d_forget.tolist() == pytest.approx([0.8, 0.4, 0.0])
    assert d_retain.tolist() == pytest.approx([0.0, 2.0, 0.0])


def test_gradients_too_small_to_square_in_float32():
    scale = 1e-25
    found = restricted_gradient(scale * vector(1, 0).float(), scale * vector(-1, 1).float())
    torch.testing.assert_close(found / scale, vector(0.5, 1.5).float())


# ----------------------------------------------------------------------------------------- the step
def gradients(scope):  # noqa: F811
    return torch.cat([parameter.grad.flatten() for parameter in scope.params.values()])


def by_hand(scope, batch):  # noqa: F811
    """Gradient of minus the forget loss, of the retain loss, and the forget loss."""
    forget, kept = diffusion(scope, batch.forget), diffusion(scope, batch.retain)
    return flat_gradient(-forget, scope.params), flat_gradient(kept, scope.params), forget.item()


@pytest.mark.parametrize("always", [False, True])
def test_backward_is_the_restricted_gradient_of_the_two_losses(scope, always):  # noqa: F811
    method = RGD(alpha=1.5, always=always, **SMALL)
    batch = first_batch(method, scope)
    before = snapshot(scope.params)
    logs = method.backward(scope, batch)
    g_forget, g_retain, loss = by_hand(scope, batch)
    torch.testing.assert_close(
        gradients(scope), restricted_gradient(g_forget, g_retain, 1.5, always), rtol=1e-4, atol=1e-8
    )
    assert logs["forget_loss"] == pytest.approx(loss, rel=1e-5)
    assert logs["loss"] == pytest.approx(1.5 * logs["retain_loss"] - loss, rel=1e-5)
    assert logs["truncated"] == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in scope.params.items())


def test_a_small_plain_step_hurts_neither_loss(scope):  # noqa: F811
    method = RGD(**SMALL)
    batch = first_batch(method, scope)
    method.backward(scope, batch)
    with torch.no_grad():
        before = [diffusion(scope, batch.forget).item(), diffusion(scope, batch.retain).item()]
        direction = gradients(scope)
        for parameter, part in zip(
            scope.params.values(), split(direction, scope.params), strict=True
        ):
            parameter -= 0.01 * part / direction.norm()
        after = [diffusion(scope, batch.forget).item(), diffusion(scope, batch.retain).item()]
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_above_the_truncation_the_retain_gradient_is_alone(scope):  # noqa: F811
    batch = first_batch(RGD(**SMALL), scope)
    _, g_retain, loss = by_hand(scope, batch)
    for limit, truncated in ((0.9 * loss, 1.0), (1.1 * loss, 0.0)):
        for parameter in scope.params.values():
            parameter.grad = None
        logs = RGD(truncate_at=limit, **SMALL).backward(scope, batch)
        assert logs["truncated"] == truncated
        close = torch.allclose(gradients(scope), g_retain, rtol=1e-4, atol=1e-8)
        assert close == bool(truncated)


# ---------------------------------------------------------------------------------------- diversity
def prompts(make_scope, **options) -> tuple[list[str], list[str]]:
    """The prompts of the images to forget and to keep."""
    scope, asked = recording(make_scope())  # noqa: F811
    RGD(**SMALL, **options).begin_request(scope)
    forget, keep = asked
    return forget, keep


def test_the_sequences_own_prompts(make_scope):
    forget, keep = prompts(make_scope, diversity="sequence")
    assert forget == [
        f"a {caption} in the style of torch light" for caption in ("ball", "box", "tent", "hoop")
    ]
    assert keep == SMALL["retain"].read(make_scope())


def test_a_single_prompt_is_the_ablation(make_scope):
    assert prompts(make_scope, diversity="narrow") == (
        ["a ball in the style of torch light"],
        ["a ball"],
    )


def test_templates_pair_each_prompt_with_itself_without_the_concept(make_scope):
    forget, keep = prompts(make_scope, diversity="diversified", num_prompts=50)
    assert len(forget) == len(keep) == len(set(keep)) == 50
    for target, other in zip(forget, keep, strict=True):
        assert target == f"{other}, torch light"


def test_templates_of_the_users_own(make_scope, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# mine\na {concept} boat\n\na boat, {concept}, at sea\n")
    forget, keep = prompts(make_scope, diversity="diversified", templates=str(path))
    assert forget == ["a torch light boat", "a boat, torch light, at sea"]
    assert keep == ["a boat", "a boat, at sea"]
    path.write_text("a {concept} boat\na boat\n")
    with pytest.raises(
        ValueError, match=r"^method.templates=.*mine.txt: 'a boat' must hold \{concept\} once"
    ):
        RGD(diversity="diversified", templates=str(path))
    for absent, message in (
        (str(tmp_path / "no.txt"), "no such file"),
        ("nope", "allowed: .*scenes_with_concept"),
    ):
        with pytest.raises(ValueError, match=f"^method.templates=.*{message}"):
            RGD(diversity="diversified", templates=absent)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a {concept} person", "a person"),
        ("a person, {concept}", "a person"),
        ("a person, {concept}, at noon", "a person, at noon"),
        ("{concept} in a cellar", "in a cellar"),
    ],
)
def test_without_concept(template, expected):
    assert without_concept(template) == expected


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_templates_are_many_and_varied(name):
    templates = read_shipped(name)
    assert len(templates) == 200
    assert all(
        template.count("{concept}") == 1 and re.fullmatch(r"an? [a-z ,{}]+", template)
        for template in templates
    )
    assert len({without_concept(template) for template in templates}) == 200
    assert len(words(templates)) == 40  # 10 emotions, 12 activities, 12 words of 10 places, 6 times


def words(texts: list[str]) -> set[str]:
    """The words of some texts that carry content."""
    empty = {
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "with",
        "image",
        "style",
        "person",
        "concept",
    }
    return {
        word for text in texts for word in re.findall(r"[a-z]+", text.lower().replace("_", " "))
    } - empty


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (config_dir() / "sequence").glob("*.yaml"))
)
def test_evaluation_prompts_share_no_word_with_the_shipped_templates(name):
    sequence = parse(compose(f"sequence={name}")).sequence.build()
    evaluated = [
        part.evaluation_prompt(concept, cross)
        for part in sequence.by_domain
        for concept in (*part.targets, *part.retain)
        for cross in part.cross_retain
    ]
    for shipped in SHIPPED:
        assert not words(evaluated) & words(read_shipped(shipped))


def test_the_diversified_method_runs_from_the_command(in_process, filled_cache):
    overrides = [override for override in SMOKE if not override.startswith("method.")]
    small = [
        "method.num_images=4",
        "method.num_prompts=4",
        "train.optimizer=sgd",
        "sequence.targets=[torch light]",
    ]
    status, _, err = in_process(
        *overrides, *small, "method=rgd", "method.diversity=diversified", "method.truncate_at=1.3"
    )
    assert (status, err) == (0, "")
