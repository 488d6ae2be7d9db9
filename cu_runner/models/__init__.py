"""Networks: load a text-to-image model, encode prompts, predict noise, sample images."""

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.loading import load_model
from cu_runner.models.text import Text

__all__ = ["DiffusionModel", "Text", "load_model"]
