"""Networks: load a text-to-image model, encode prompts, predict noise, sample images."""

from cu_runner.models.diffusion import DiffusionModel, Text, load_model

__all__ = ["DiffusionModel", "Text", "load_model"]
