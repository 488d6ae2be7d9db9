"""A model from what conf/model says of it."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from cu_runner.models.checkpoint_files import locate
from cu_runner.models.checkpoints import PredictionType, read_components
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.runtime.lazy import torch
from cu_runner.schema.errors import ModelError
from cu_runner.schema.settings import Precision, Sampler


def load_model(
    path: str,
    resolution: PositiveInt,
    sampler: Sampler,
    precision: Precision = "fp32",
    *,
    revision: str | None = None,
    config: str | None = None,
    prediction_type: PredictionType | None = None,
    vae_slicing: bool = False,
    classes: str | list[str] | None = None,
    tokens: PositiveInt | None = None,
    shared: str | None = None,
    quantised: Literal["int8"] | None = None,
    allow_pickle: tuple[str, ...] = (),
    device: str = "cpu",
) -> DiffusionModel:
    """Load a text-to-image model, or one with classes; what it is its model_index.json says.

    Known are Stable Diffusion 1, 2, XL and 3, FLUX.1, PixArt, Sana, AuraFlow, and their like.

    Args:
        path: a diffusers directory, a single file in the original layout, or the id of a diffusers
            repository on the Hugging Face hub; `package:...` is inside the installed package.
        resolution: image side in pixels.
        sampler: default denoising steps and guidance.
        precision: of the forward passes. bf16 holds what is not trained in it too; fp16 is for
            passes without gradients, those with gradients are fp32.
        revision: branch, tag or commit of a hub repository.
        config: for a single file, a diffusers directory (or hub id) of the same kind: its
            configurations and tokenizers are read.
        prediction_type: what the UNet predicts, where the checkpoint's scheduler says it wrongly.
        vae_slicing: encode and decode images one by one: less memory.
        classes: of a UNet2DModel with num_class_embeds, their names in its order, a shipped list,
            or a text file with one a line. One class more in the UNet is the null class.
        tokens: how many of a prompt T5 or Gemma reads; None is as many as diffusers' pipeline lets
            them (256 for Stable Diffusion 3 and AuraFlow, 512 for FLUX, 300 for PixArt and Sana).
        shared: another directory, or hub id (its main branch), with the text encoders, their
            tokenizers and the autoencoder that a directory with a transformer lacks: one T5 for
            Stable Diffusion 3 and FLUX. A text encoder is found by its class. The transformer and
            the scheduler are never taken from it.
        quantised: of a directory with a transformer, int8 holds the linear layers of T5 or Gemma
            and of the transformer in eight bits, by torchao, but for those that read the text,
            which may be trained; None holds all as `precision` says.
        allow_pickle: files that may be read although they are pickles; as weights only, whatever
            they hold.
        device: as torch names it.

    Raises:
        ModelError: missing checkpoint or component, weights that are incomplete or of a wrong
            shape, a precision that the device does not have.
    """
    target = torch.device(device)
    on_gpu = target.type == "cuda"
    if precision == "bf16" and on_gpu and torch.cuda.get_device_capability(target) < (8, 0):
        raise ModelError("model.precision=bf16: this GPU does not have it; use fp16 or fp32")
    components = read_components(
        locate(path, revision),
        config=config,
        prediction_type=prediction_type,
        classes=classes,
        tokens=tokens,
        shared=shared,
        quantised=quantised,
        allow_pickle=allow_pickle,
    )
    return DiffusionModel(
        components,
        resolution=resolution,
        sampler=sampler,
        precision=precision,
        device=target,
        vae_slicing=vae_slicing,
    )
