"""Methods and regularizers on transformers: a request of each, or a line that says why not."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from conftest import compose
from small_runs import names, overrides

from cu_runner.concepts.requests import plan_requests
from cu_runner.config.compose import parse
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import snapshot
from cu_runner.request.scope import Scope
from cu_runner.runner.parts import check_linear, named
from cu_runner.runner.training import check_composition, erase
from cu_runner.runtime.seeding import RandomSource
from cu_runner.schema.settings import Sampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KINDS = ("sd3_medium", "flux_dev", "pixart_sigma", "sana", "auraflow")
METHODS = [name for name in names("method") if name != "imported"]
CLOSED = ("uce", "speed", "oce", "dp", "mace_fusion")
# gates are weights of the model, and have a test of their own
REGS = [name for name in names("reg") if name not in ("none", "recommended", "gate")]
LINEAR = ("gradproj", "gradproj_l1", "gradproj_merge", "selft_gradproj", "nullspace", "minvar")


@functools.cache
def loaded(directory: Path) -> DiffusionModel:
    # as few tokens as the prompts have: the text is what costs here
    return load_model(str(directory), 64, Sampler(2, 3.0), tokens=24)


def parts_of(method: str, reg: str, *more: str):
    words = [*overrides(method, reg), "sequence=smoke", *more]
    if method in ("conabl", "sculpmem"):
        words.append("method.begin_token=trained")
    plan = parse(compose(*words))
    return plan.method.build(), {name: node.build() for name, node in plan.regularizers.items()}


@pytest.fixture
def make_request(transformers_on_disk, sequence, settings):
    """Returns make(kind, method) -> Scope of the first request."""

    def make(kind: str, method) -> Scope:
        model = loaded(transformers_on_disk[kind])
        params = method.weights(model)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(64, *model.latent_shape, generator=generator)
        start = snapshot(params)
        return Scope(
            model=model,
            sequence=sequence,
            request=plan_requests(sequence, "sequential")[0],
            params=params,
            start=start,
            base=snapshot(params),
            rng=RandomSource(0, 1),
            train=settings(batch_size=2, steps=2),
            anchors=lambda prompts, number, mirrored=False: latents[:number],
        )

    return make


def put_back(scope: Scope) -> None:
    with torch.no_grad():
        for name, parameter in scope.params.items():
            parameter.copy_(scope.base[name])
            parameter.requires_grad_(False)
            parameter.grad = None


def moved(scope: Scope) -> list[str]:
    return [name for name, each in scope.params.items() if not each.equal(scope.base[name])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_of_every_method(make_request, kind, method):
    more = ["method.params=text_linear"] if method in CLOSED else []
    chosen, _ = parts_of(method, "none", *more)
    scope = make_request(kind, chosen)
    try:
        check_linear(scope.model, chosen, named(method, chosen, {}))
        report = erase(scope, chosen, {}, scope.train)
        assert len(report.logs) == (1 if method in CLOSED else 2)
        assert moved(scope)
        assert all(each.isfinite().all() for each in scope.params.values())
    finally:
        put_back(scope)


@pytest.mark.parametrize("reg", REGS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_regularizer_runs_or_is_refused(make_request, kind, reg):
    method_name = "uce" if reg == "rece" else "conabl"
    needs = reg in (*LINEAR, "rece")
    more = ["method.params=text_linear"] if needs else []
    method, regularizers = parts_of(method_name, reg, *more)
    check_composition(method, regularizers)
    scope = make_request(kind, method)
    try:
        chosen = named(method_name, method, regularizers)
        if reg == "minvar" and kind == "sd3_medium":
            with pytest.raises(ValueError, match=r"reg=minvar .* once in the positions of each"):
                check_linear(scope.model, method, chosen)
            return
        check_linear(scope.model, method, chosen)
        report = erase(scope, method, regularizers, scope.train)
        assert report.logs
        assert moved(scope)
    finally:
        put_back(scope)


@pytest.mark.parametrize("kind", ["flux_dev", "pixart_sigma", "sana"])
def test_gates_stand_where_the_text_enters(transformers_on_disk, make_request, sequence, kind):
    method, regularizers = parts_of("conabl", "gate", "method.params=text_linear")
    scope = make_request(kind, method)
    own = load_model(str(transformers_on_disk[kind]), 64, Sampler(2, 3.0), tokens=24)
    before = dict(own.denoiser.named_parameters())
    gates = regularizers["gate"].own_weights(own, sequence, method)
    assert len([name for name in gates if name.endswith("gate_values")]) == 1
    scope = dataclasses.replace(
        scope, model=own, params=gates, start=snapshot(gates), base=snapshot(gates)
    )
    named = scope.request.targets[0].prompt_name
    shut = own.encode_prompts([f"a {named} ball", ""])
    arguments = (torch.zeros(2, *own.latent_shape), torch.tensor([500, 500]), shut)
    with torch.no_grad():
        untouched = own.predict(*arguments)
    report = erase(scope, method, regularizers, scope.train)
    with torch.no_grad():
        after = own.predict(*arguments)
    assert len(report.logs) == 2
    assert not torch.equal(after[0], untouched[0])  # its name opens the gate
    assert torch.equal(after[1], untouched[1])  # the empty prompt opens none
    assert all(each.grad is None for each in before.values())


@pytest.mark.parametrize("reg", ["gradproj", "nullspace", "minvar", "gate"])
@pytest.mark.parametrize("kind", ["sd3_medium", "pixart_sigma"])
def test_weights_that_are_not_linear_in_the_text_are_refused(make_request, kind, reg):
    method, regularizers = parts_of("conabl", reg)
    scope = make_request(kind, method)
    with pytest.raises(ValueError, match=f"reg={reg} .*choose method.params=text_linear"):
        check_linear(scope.model, method, named("conabl", method, regularizers))


@pytest.mark.parametrize("kind", ["sd3_medium", "pixart_sigma"])
def test_weights_are_scored_along_the_models_own_steps(make_request, kind):
    """A flow has no DDIM, by which the released code scores."""
    trajectory = ["reg.selft.scoring=trajectory", "reg.selft.steps=2"]
    method, regularizers = parts_of("conabl", "selft", *trajectory)
    scope = make_request(kind, method)
    try:
        erase(scope, method, regularizers, scope.train)
        assert moved(scope)
    finally:
        put_back(scope)
