"""Image features that FID and KID compare.

Shapes: B batch, S image side, D feature width.
"""

from __future__ import annotations

import hashlib
import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from cu_runner.models.checkpoint_files import locate
from cu_runner.models.hashing import describe_timm, hash_weights, to_bytes
from cu_runner.models.image_text import ImageTextModel, ImageTextSource, load_image_text
from cu_runner.models.weight_files import (
    COMPUTED,
    check_finite,
    check_pickle,
    load_tensors,
    refuse_strangers,
)
from cu_runner.runtime.lazy import F, nn, timm, torch, without_gradients
from cu_runner.schema.errors import ModelError, one_line
from cu_runner.schema.words import Matches

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

ARCHITECTURE = r"inception|timm:.+|open_clip(:.+)?|module"
NAMES = "inception, timm:NAME, open_clip, open_clip:NAME or module"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FeatureSource:
    """What computes the features.

    architecture: "inception", torch-fidelity's Inception-v3 with its 2048 features, as FID is
    published; "timm:NAME"; "open_clip:NAME" or "open_clip" (a directory); or "module", a
    TorchScript file that maps images to [B, D].
    path: weight file, directory or module file; nothing is fetched. Of "inception": a pickle, see
    conf/retention/coco.yaml.
    size, mean, std: what "timm" and "module" read, in pixels and for images in 0..1; the others
    know theirs. None is 224 pixels and, of "timm", the mean and std that the architecture was
    trained with, of "module" 0.5.
    allow_pickle: files other than safetensors that may be read; a module file must be among them.
    """

    architecture: Annotated[str, Matches(ARCHITECTURE, NAMES)]
    path: str
    size: PositiveInt | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    allow_pickle: tuple[str, ...] = ()


class FeatureExtractor:
    """Images to features, in float64 on the CPU, where their covariances are summed."""

    def __init__(self, source: FeatureSource, device: str) -> None:
        """Load what the source names.

        Raises:
            ModelError, WeightFileError: it cannot be loaded.
        """
        self._source, self._device = source, device
        network = load_network(source, device)
        self._network = (
            network if isinstance(network, ImageTextModel) else network.to(device).eval()
        )
        if not isinstance(network, ImageTextModel):
            check_finite(source.path, network.state_dict())
        trained: Any = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        if not isinstance(network, ImageTextModel) and source.architecture.startswith("timm:"):
            trained = network.pretrained_cfg
        self._size = source.size or 224
        self._mean: tuple[float, ...] = source.mean or tuple(trained["mean"])
        self._std: tuple[float, ...] = source.std or tuple(trained["std"])
        if source.architecture.startswith(("timm:", "module")):
            reading = (source.path, self._size, self._mean, self._std)
            logger.info("retention: %s reads images with size=%d mean=%s std=%s", *reading)

    @without_gradients
    def __call__(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] in 0..1 to features [B, D].

        Raises:
            ModelError: a module makes something else of them.
        """
        images, source, network = images.to(self._device), self._source, self._network
        if isinstance(network, ImageTextModel):
            features = network.embed_images(images)
        elif source.architecture == "inception":
            # it resizes by itself, as the published implementation does
            features = network((images * 255).round().to(torch.uint8))
        else:
            if images.shape[-1] != self._size:
                side = (self._size, self._size)
                images = F.interpolate(images, size=side, mode="bicubic", antialias=True)
                images = images.clamp(0, 1)
            mean, std = (
                torch.tensor(value, device=self._device).view(1, -1, 1, 1)
                for value in (self._mean, self._std)
            )
            features = network((images - mean) / std)
        is_tensor = isinstance(features, torch.Tensor)
        if not is_tensor or features.ndim != 2 or len(features) != len(images):
            raise ModelError(
                f"{source.path}: must map {len(images)} images to as many rows of features"
            )
        return features.double().cpu()

    def fingerprint(self) -> str:
        """Return the sha256 over weights, what else decides the features, and preprocessing."""
        source = self._source
        kind, _, name = source.architecture.partition(":")
        digest = hashlib.sha256(to_bytes([kind, self._size, self._mean, self._std]))
        if isinstance(self._network, ImageTextModel):
            digest.update(self._network.fingerprint().encode())
            return digest.hexdigest()
        if kind == "timm":
            digest.update(to_bytes(describe_timm(name)))
        elif kind == "module":  # its code is in the file
            digest.update(hashlib.sha256(locate(source.path).read_bytes()).digest())
        hash_weights(digest, self._network)
        return digest.hexdigest()


def load_network(source: FeatureSource, device: str) -> nn.Module | ImageTextModel:
    """Load what FeatureSource names. Raises ModelError or WeightFileError."""
    kind, _, name = source.architecture.partition(":")
    if kind == "open_clip":
        model, weight_file = (name, source.path) if name else (str(locate(source.path)), None)
        return load_image_text(ImageTextSource(model, weight_file, source.allow_pickle), device)
    if kind == "inception":
        return load_inception(source)
    path = locate(source.path)
    if kind == "module":
        check_pickle(path, source.allow_pickle)
        try:
            return torch.jit.load(path, map_location=device)
        except RuntimeError as error:
            raise ModelError(
                f"{source.path}: is no TorchScript file ({one_line(error)[:200]})"
            ) from error
    try:
        network = timm.create_model(name, pretrained=False)
    except RuntimeError as error:
        raise ModelError(
            f"timm:{name}: {one_line(error)}; timm.list_models() has all names"
        ) from None
    whole = set(network.state_dict())
    network.reset_classifier(0)
    wanted = network.state_dict()
    # files of older versions lack what layers compute by themselves
    weights = {name: tensor for name, tensor in wanted.items() if name.endswith(COMPUTED)}
    weights |= load_tensors(path, source.allow_pickle)
    if wrong := sorted(
        name
        for name, tensor in wanted.items()
        if name not in weights or weights[name].shape != tensor.shape
    ):
        raise ModelError(
            f"{source.path}: {wrong[0]} is missing or has another shape; the file belongs to "
            "another architecture"
        )
    # the head of the file, if there is one, is not needed
    refuse_strangers(source.path, sorted(set(weights) - whole))
    network.load_state_dict({name: weights[name] for name in wanted})
    return network


def load_inception(source: FeatureSource) -> nn.Module:
    """Load the Inception-v3 of torch-fidelity with the weights of a file.

    Raises:
        ModelError: no torch-fidelity, or no such weights. WeightFileError: a pickle that is not
            allowed.
    """
    path = locate(source.path)
    check_pickle(path, source.allow_pickle)
    if find_spec("torch_fidelity") is None:
        raise ModelError(
            "features.architecture=inception needs the package torch-fidelity: "
            "pip install 'cu_runner[fid]'"
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:  # it reads the file as weights alone, torch's default
        return NoTrainInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    except Exception as error:  # of torch and of the file; the cause is kept in the line
        raise ModelError(
            f"{source.path}: holds no weights of inception ({one_line(error)[:200]})"
        ) from error
