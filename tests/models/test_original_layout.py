"""The original layout as it is written: the names that tests/single_file.py derives by itself, and
what diffusers reads back.
"""

import pytest
import safetensors.torch
import torch
from single_file import original_weights as by_hand

from cu_runner.models.loading import load_model
from cu_runner.models.original_layout import markers, original_weights, unet_names
from cu_runner.models.pipeline import make_pipeline, save_configurations
from cu_runner.runner.export import same_weights
from cu_runner.schema.settings import Sampler


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_names_are_those_derived_elsewhere(pipelines, kind):
    model = load_model(str(pipelines[kind]), 64, Sampler(2, 2.5))
    ours, others = original_weights(model.components), by_hand(pipelines[kind])
    assert ours.keys() == others.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, others[name]), name


@pytest.mark.parametrize("kind", ["sd15", "sd21_base", "sdxl"])
def test_what_is_written_is_read_back_as_the_same_model(pipelines, kind, tmp_path):
    model = load_model(str(pipelines[kind]), 64, Sampler(2, 2.5))
    save_configurations(make_pipeline(model), tmp_path / "config")
    weights = {name: each.contiguous() for name, each in original_weights(model.components).items()}
    safetensors.torch.save_file(weights, tmp_path / "x.safetensors")
    found = load_model(
        str(tmp_path / "x.safetensors"), 64, Sampler(2, 2.5), config=str(tmp_path / "config")
    )
    assert found.fingerprint() == model.fingerprint()
    with torch.no_grad():
        next(model.denoiser.parameters()).flatten()[0] += 1
    assert not same_weights(found.denoiser, model.denoiser)


def test_a_unet_of_another_build_has_no_such_names(pipelines):
    unet = load_model(str(pipelines["sd15"]), 64, Sampler(2, 2.5)).denoiser
    unet.register_to_config(layers_per_block=[1, 2, 1, 1])
    with pytest.raises(ValueError, match="not all as deep"):
        unet_names(unet)


def test_markers_say_how_the_model_was_trained():
    assert markers({"prediction_type": "epsilon"}) == {}
    trained = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert set(markers(trained)) == {"v_pred", "ztsnr"}
