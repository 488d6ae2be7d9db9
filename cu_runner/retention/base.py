"""What a measurement of retention provides, beside RA-I and RA-C."""

from __future__ import annotations

from abc import ABC, abstractmethod

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.schema.settings import EvalSettings
from cu_runner.store.cache import Cache


class Retention(ABC):
    """Measures the model after every request on what is no concept of the run."""

    @property
    @abstractmethod
    def num_images(self) -> int:
        """Return the number of images that are made at every step."""

    @abstractmethod
    def load(self) -> None:
        """Load what measures. Raises ValueError or OSError for what cannot be read."""

    @abstractmethod
    def begin(
        self, model: DiffusionModel, model_sha256: str, settings: EvalSettings, cache: Cache
    ) -> None:
        """Call load(), and measure the untouched model (or take that from the cache).

        Args:
            model: with its own weights; measure() later finds it with those of a step.
            model_sha256: fingerprint of the untouched model.
            settings: how images are sampled.
        """

    @abstractmethod
    def measure(self, step: int) -> dict[str, float | None]:
        """Measure the model as it is.

        Returns:
            Columns of metrics.csv, the same names at every step; None where one means nothing.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return the sha256 over what measures, after load()."""
