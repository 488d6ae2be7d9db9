"""Whether an image shows a face: a name read off an image without one is worth nothing.

Shapes: B batch, S image side.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from cu_runner.evaluators.labels import check_label_maps
from cu_runner.models.checkpoint_files import locate
from cu_runner.models.component_files import load_weights
from cu_runner.models.hashing import describe, hash_weights, to_bytes
from cu_runner.runtime.lazy import transformers, without_gradients
from cu_runner.schema.errors import ModelError, one_line

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FaceSettings:
    """How faces are found.

    path: a transformers object-detection directory that knows faces. domain: whose labels need a
    face ("celebrity"). threshold: least score of a face, 0..1. classes: the detector's classes that
    are faces; None: all of them.
    """

    path: str
    domain: str
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    classes: tuple[str, ...] | None = None


class FaceDetector:
    """A transformers object detector with its own image processor."""

    def __init__(self, settings: FaceSettings, device: str) -> None:
        """Load the detector and its image processor.

        Raises:
            ModelError: a directory that cannot be loaded, or without the classes that are asked
                for.
        """
        self.domain = settings.domain
        directory = locate(settings.path)
        check_label_maps(directory)
        self.network = (
            load_weights(transformers.AutoModelForObjectDetection, directory).to(device).eval()
        )
        try:
            self._processor = transformers.AutoImageProcessor.from_pretrained(
                directory, local_files_only=True
            )
        except (OSError, ValueError, ImportError) as error:
            reason = one_line(error)[:200]
            raise ModelError(
                f"{settings.path}: its image processor cannot be read ({reason})"
            ) from error
        names = self.network.config.id2label
        wanted = list(names.values()) if settings.classes is None else settings.classes
        if unknown := [name for name in wanted if name not in names.values()]:
            known = ", ".join(list(names.values())[:5])
            raise ModelError(
                f"{settings.path}: detects no class {unknown[0]!r} (it knows {known}); correct "
                "evaluator.faces.classes"
            )
        self._faces = [index for index, name in names.items() if name in wanted]
        self._threshold, self._device = settings.threshold, device

    def fingerprint(self) -> str:
        """Return the sha256 over weights, configurations, and which faces count.

        Configurations are of the network and of the image processor.
        """
        network = describe(self.network, self.network.config.to_dict())
        processor = describe(self._processor, self._processor.to_dict())
        digest = hashlib.sha256(to_bytes([network, processor, self._faces, self._threshold]))
        hash_weights(digest, self.network)
        return digest.hexdigest()

    @without_gradients
    def find(self, images: Tensor) -> list[bool]:
        """Tell of each of the images [B, 3, S, S] in 0..1 whether it shows a face."""
        inputs = self._processor(
            images=list(images.cpu()), do_rescale=False, return_tensors="pt"
        ).to(self._device)
        found = self._processor.post_process_object_detection(
            self.network(**inputs), threshold=self._threshold
        )
        return [any(label in self._faces for label in each["labels"].tolist()) for each in found]
