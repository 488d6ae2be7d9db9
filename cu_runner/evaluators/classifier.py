"""One image classifier per domain, each a transformers directory (config.json with id2label, safetensors)."""

import hashlib

import torch
import torch.nn.functional as F
import transformers
from pydantic import PositiveInt
from torch import Tensor

from cu_runner.evaluators.base import Evaluator, Prediction
from cu_runner.model_files import load_weights, locate


class Classifier(Evaluator):
    """Predicts the most probable label of each domain."""

    def __init__(
        self, paths: dict[str, str], size: PositiveInt, mean: list[float], std: list[float], *, device: str = "cpu"
    ) -> None:
        """
        Args:
            paths: domain -> classifier directory; `package:...` is one inside the installed package.
            size: image side that the classifiers read, in pixels; other sizes are resized (bilinear, anti-aliased).
            mean, std: of each colour channel, for images in 0..1.

        Raises:
            ModelError: a directory is missing, incomplete or does not fit its configuration.
        """
        kind = transformers.AutoModelForImageClassification
        self._models = {domain: load_weights(kind, locate(path)).to(device).eval() for domain, path in paths.items()}
        self._size = size
        self._mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    @torch.no_grad()
    def predict(self, images: Tensor) -> dict[str, Prediction]:
        if images.shape[-1] != self._size:
            images = F.interpolate(images, size=(self._size, self._size), mode="bilinear", antialias=True)
        inputs = (images - self._mean) / self._std
        predictions = {}
        for domain, model in self._models.items():
            best = model(inputs).logits.float().softmax(1).max(1)
            names = model.config.id2label
            predictions[domain] = Prediction([names[index] for index in best.indices.tolist()], best.values.tolist())
        return predictions

    def labels(self) -> dict[str, list[str]]:
        return {domain: list(model.config.id2label.values()) for domain, model in self._models.items()}

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        digest.update(repr((self._size, self._mean.tolist(), self._std.tolist())).encode())
        for domain, model in sorted(self._models.items()):
            digest.update(repr((domain, sorted(model.config.id2label.items()))).encode())
            for name, tensor in model.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
