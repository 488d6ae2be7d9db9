"""cu_runner: continual unlearning for text-to-image diffusion models, measured after every request."""

__version__ = "0.1.0"
