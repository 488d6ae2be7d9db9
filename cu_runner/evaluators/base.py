"""What an evaluator provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


Faceless = Literal["excluded", "forgotten"]


@dataclass(frozen=True)
class Prediction:
    """Of B images in one domain: labels, and the score (probability) of each label [B].

    faces: whether each image shows a face, where labels are only worth something on faces; the
    label of one without is "". faceless: what images without one count for (metrics).
    """

    labels: list[str]
    scores: list[float]
    faces: list[bool] | None = None
    faceless: Faceless = "excluded"


class Evaluator(ABC):
    """What names the content of images in each domain it knows.

    Metrics are computed from the saved predictions, never from it.
    """

    @abstractmethod
    def predict(self, images: Tensor) -> dict[str, Prediction]:
        """Map images [B, 3, S, S] in 0..1 to one Prediction per domain."""

    @abstractmethod
    def labels(self) -> dict[str, list[str]]:
        """Return the labels that can be predicted, per domain."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return the sha256 over the weights: two evaluators with one fingerprint predict alike."""
