"""Frozen weights in eight bits. torchao is no package of make setup; with it these tests run."""

import importlib.util

import pytest
import torch

from cu_runner.models import quantised
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import select_parameters
from cu_runner.models.pipeline import make_pipeline
from cu_runner.models.quantised import is_quantised
from cu_runner.schema.errors import ModelError
from cu_runner.schema.settings import Sampler

SAMPLER = Sampler(2, 3.0)
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


def test_what_cannot_be_quantised_is_refused_in_a_line(
    pipelines, transformers_on_disk, monkeypatch
):
    with pytest.raises(ModelError, match=r"model.quantised=int8: .* has no transformer"):
        load_model(str(pipelines["sd15"]), 64, SAMPLER, quantised="int8")
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"the package torchao; pip install 'cu-runner\[quan"):
        load_model(str(transformers_on_disk["sd3_medium"]), 64, SAMPLER, quantised="int8")


@needs_torchao
@pytest.mark.parametrize("kind", ["sd3_medium", "flux_dev", "pixart_sigma", "sana"])
def test_what_reads_the_text_stays_and_the_rest_has_eight_bits(transformers_on_disk, kind):
    directory = str(transformers_on_disk[kind])
    whole, small = (
        load_model(directory, 64, SAMPLER, tokens=24, quantised=each) for each in (None, "int8")
    )
    assert small.fingerprint() != whole.fingerprint()
    assert (
        small.fingerprint()
        == load_model(directory, 64, SAMPLER, tokens=24, quantised="int8").fingerprint()
    )
    params = select_parameters(small.denoiser, "reads_text")
    assert not any(map(is_quantised, params.values()))
    assert any(map(is_quantised, small.denoiser.parameters()))
    assert any(map(is_quantised, small.text_encoders[-1].parameters()))
    with pytest.raises(ValueError, match=r"method.params=full: .* is held in eight bits"):
        select_parameters(small.denoiser, "full")
    with pytest.raises(ModelError, match="holds weights in eight bits"):
        make_pipeline(small)
    noisy = torch.randn(2, *small.latent_shape, generator=torch.Generator().manual_seed(0))
    arguments = (noisy, torch.tensor([300, 700]))
    text = [model.encode_prompts(["a dog", "a cat"]) for model in (whole, small)]
    with torch.no_grad():
        wanted = whole.predict(*arguments, text[0])
        found = small.predict(*arguments, text[1])
    assert 0 < (found - wanted).square().mean() < 0.01 * wanted.square().mean()
    for parameter in params.values():
        parameter.requires_grad_(True)
    small.predict(*arguments, text[1]).square().mean().backward()
    keys = select_parameters(small.denoiser, "k_xattn")
    assert all(each.grad.isfinite().all() and each.grad.any() for each in keys.values())
    assert all(each.dtype == torch.float32 for each in params.values())


@needs_torchao
def test_frozen_weights_in_bf16_beside_it_are_bitwise_the_same(transformers_on_disk):
    directory = str(transformers_on_disk["sd3_medium"])
    model = load_model(directory, 64, SAMPLER, "bf16", tokens=24, quantised="int8")
    noisy = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    arguments = (noisy, torch.tensor([300, 700]), model.encode_prompts(["a dog", "a cat"]))
    with torch.no_grad():
        before = model.predict(*arguments)
        trained = select_parameters(model.denoiser, "kv_xattn")
        model.lower_frozen(set(trained))
        assert torch.equal(model.predict(*arguments), before)
    assert {each.dtype for each in trained.values()} == {torch.float32}
    assert model.denoiser.context_embedder.weight.dtype == torch.bfloat16
