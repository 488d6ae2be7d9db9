"""Networks: load a text-to-image model, encode prompts, predict noise, sample images."""

from cu_runner.models.diffusion import DiffusionModel, load_model
from cu_runner.models.text import Text

__all__ = ["DiffusionModel", "Text", "load_model"]
