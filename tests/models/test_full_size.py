"""Stable Diffusion 1, 2 and SDXL at their full size, with random weights: one training step and one
image in bf16. Minutes each.
"""

import pytest
import torch
from conftest import read_conf
from filelock import FileLock

from cu_runner.concepts.requests import plan_requests
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.methods.conabl import ConAbl
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import select_parameters, snapshot
from cu_runner.models.sampling import generate
from cu_runner.request.scope import Scope
from cu_runner.runner.training import erase
from cu_runner.runtime.devices import peak_memory_mb
from cu_runner.runtime.seeding import RandomSource
from cu_runner.schema.settings import Sampler, Speed

PARAMETERS = {
    "sd15": 859_520_964,
    "sd21_base": 865_910_724,
    "sdxl": 2_567_463_684,
}  # of the published UNets


@pytest.fixture
def alone(tmp_path_factory):
    """No other worker has a model of full size meanwhile: two do not fit into memory."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "full_size.lock"):
        yield


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", PARAMETERS)
def test_one_training_step_and_one_image_in_bf16(
    kind, alone, random_pipeline, settings, tmp_path, record_property
):
    random_pipeline.make_pipeline(kind, tmp_path / kind, dtype=torch.float16)
    side = read_conf(f"model/{kind}.yaml")["resolution"]
    model = load_model(str(tmp_path / kind), side, Sampler(1, 1.0), "bf16", vae_slicing=True)
    assert sum(parameter.numel() for parameter in model.denoiser.parameters()) == PARAMETERS[kind]
    params = select_parameters(model.denoiser, "kv_xattn")
    base = snapshot(params)
    model.lower_frozen(params)
    model.checkpoint_gradients()
    model.speed_up(Speed())
    sequence = make_sequence(**read_conf("sequence/unlearncanvas_style.yaml"))
    scope = Scope(
        model,
        sequence,
        plan_requests(sequence, "sequential")[0],
        params,
        base,
        base,
        RandomSource(0, 1),
        settings(steps=1, batch_size=1, lr=1e-5),
        lambda prompts, number, mirrored=False: torch.randn(number, *model.latent_shape),
    )
    erase(scope, ConAbl(num_anchors=1), {}, settings(steps=1, batch_size=1, lr=1e-5))
    assert {parameter.dtype for parameter in params.values()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in params.values())
    assert all(not torch.equal(parameter, base[name]) for name, parameter in params.items())
    (image,) = next(
        generate(model, ["a painting of a dog"], [0], Sampler(1, 1.0), batch_size=1, label="")
    )
    assert image.shape == (3, side, side)
    assert image.isfinite().all()
    record_property("peak_memory_mb", peak_memory_mb(model.device))
    print(f"{kind}: peak memory {peak_memory_mb(model.device):.0f} MB")
