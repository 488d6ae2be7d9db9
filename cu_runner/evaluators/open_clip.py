"""Zero-shot classification by any open_clip model.

It predicts the label whose prompts lie nearest to the image (Radford et al. 2021, Sec. 3.1.4).

Shapes: B batch, S image side, K labels of a domain, E embedding width.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from cu_runner.evaluators.base import Evaluator, Prediction
from cu_runner.evaluators.labels import read_labels
from cu_runner.models.image_text import ImageTextSource, load_image_text
from cu_runner.runtime.lazy import F, without_gradients

if TYPE_CHECKING:
    from torch import Tensor

PHOTOS = ("a photo of {label}", "an image of {label}", "a picture of {label}")


class OpenClip(Evaluator):
    """Predicts, in each domain, the label whose averaged prompts have the highest cosine.

    The cosine is that with the image.
    """

    def __init__(
        self,
        model: str,
        labels: dict[str, str | list[str]],
        *,
        path: str | None = None,
        templates: list[str] | dict[str, list[str]] | None = None,
        allow_pickle: list[str] | None = None,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            model: an architecture of open_clip, a .json of one's own, an open_clip directory, or
                hf-hub:OWNER/NAME.
            labels: domain -> its labels: themselves, the name of a shipped list, a text file with
                one a line, or imagenet.
            path: the weight file, for an architecture or a .json.
            templates: prompts with {label}, for all domains or by domain; their embeddings are
                averaged.
            allow_pickle: weight files other than safetensors that may be read.

        Raises:
            ValueError: labels or templates that cannot be used. ModelError, WeightFileError: a
                model that cannot be loaded.
        """
        self._labels = {
            domain: read_labels(f"evaluator.labels.{domain}", source)
            for domain, source in labels.items()
        }
        self._prompts = {
            domain: spell(names, choose_templates(templates, domain))
            for domain, names in self._labels.items()
        }
        self._model = load_image_text(
            ImageTextSource(model, path, tuple(allow_pickle or ())), device
        )
        self._directions: dict[str, Tensor] = {}  # domain -> [K, E]
        for domain, prompts in self._prompts.items():
            rows = self._model.embed_texts([text for texts in prompts for text in texts])
            means = rows.unflatten(0, (len(prompts), -1)).mean(1)
            self._directions[domain] = F.normalize(means, dim=-1)

    @without_gradients
    def predict(self, images: Tensor) -> dict[str, Prediction]:
        """Map images [B, 3, S, S] in 0..1 to one Prediction per domain."""
        embedded = self._model.embed_images(images)
        predictions = {}
        for domain, directions in self._directions.items():
            best = (self._model.scale * embedded @ directions.T).softmax(1).max(1)
            labels = [self._labels[domain][index] for index in best.indices.tolist()]
            predictions[domain] = Prediction(labels, best.values.tolist())
        return predictions

    def labels(self) -> dict[str, list[str]]:
        """Return the labels that can be predicted, per domain."""
        return self._labels

    def fingerprint(self) -> str:
        """Return the sha256 over the model and the prompts."""
        return hashlib.sha256(
            repr((self._model.fingerprint(), sorted(self._prompts.items()))).encode()
        ).hexdigest()


def choose_templates(templates: list[str] | dict[str, list[str]] | None, domain: str) -> list[str]:
    """Choose the prompts of a domain.

    Raises:
        ValueError: there are none, or one does not hold {label} alone.
    """
    own = templates.get(domain) if isinstance(templates, dict) else templates
    chosen = PHOTOS if own is None else own
    if not chosen:
        raise ValueError(
            f"evaluator.templates: none for {domain}; give at least one prompt with {{label}}"
        )
    for template in chosen:
        if "{label}" not in template or "{" in template.replace("{label}", ""):
            raise ValueError(
                f"evaluator.templates: {template!r} must hold {{label}} and no other placeholder"
            )
    return list(chosen)


def spell(labels: list[str], templates: list[str]) -> list[list[str]]:
    """Write the prompts of each label; underscores of label lists are read as spaces."""
    return [
        [template.replace("{label}", label.replace("_", " ")) for template in templates]
        for label in labels
    ]
