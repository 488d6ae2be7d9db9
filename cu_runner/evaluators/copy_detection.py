"""Whether an image is a copy of one that the model has memorised, by SSCD.

A Self-Supervised Descriptor for Image Copy Detection (Pizzi et al. 2022, arXiv 2202.10261) maps
images to points; copies lie close by. The similarity of two images is the cosine of theirs, and one
is a copy of the other where it is above 0.5, as in Somepalli et al. 2023 (arXiv 2212.03860).

Shapes: B batch, S image side, C channels, N reference images, D width of a descriptor.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

from cu_runner.evaluators.base import Evaluator, Prediction
from cu_runner.evaluators.open_clip import OpenClip
from cu_runner.models.hashing import hash_weights, to_bytes
from cu_runner.models.pictures import find_pictures, read_pictures
from cu_runner.models.preprocessing import Preprocessing
from cu_runner.models.weight_files import (
    COMPUTED,
    check_finite,
    check_pickle,
    load_tensors,
    refuse_strangers,
)
from cu_runner.runtime.lazy import F, nn, torch, without_gradients
from cu_runner.schema.errors import ModelError, one_line
from cu_runner.schema.words import Matches

if TYPE_CHECKING:
    from torch import Tensor

NONE = "none"  # the label of an image that copies nothing
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POWER = 3.0  # of the generalised mean over places (Pizzi et al. 2022)
SMALLEST = 1e-6  # activations are at least this before the power, as in the authors' code
TOGETHER = 16  # references that are read at once
KEY = "evaluator.references"
ARCHITECTURE = Matches(
    r"module|resnet(18|34|50|101|152)|resnext101_32x8d",
    "module (a TorchScript file), resnet50, or another ResNet of torchvision",
)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OtherDomains:
    """An open_clip model that names what else an image shows, as evaluator=open_clip does.

    model, path, templates: as there. labels: domain -> its labels.
    """

    model: str
    labels: dict[str, str | list[str]]
    path: str | None = None
    templates: list[str] | dict[str, list[str]] | None = None


class CopyDetection(Evaluator):
    """Names, of each image, the memorised concept whose reference images it copies, or "none".

    With d(x) the descriptor of image x, of length 1, and R_c the reference images of concept c:

        s_c(x) = max over r in R_c of d(x) . d(r)          similarity to a concept, -1..1
        label  = argmax over c of s_c(x)   if that is above the threshold, else "none"

    So UA is the percentage of images, of prompts that made the model repeat a memorised image, that
    are a copy of it no longer; the base rate of UA says how many of them never were one. RA_I is
    the percentage of images that still copy the references of retained concepts. An image that is
    nearer to another concept's references counts as a copy of that concept alone. The score of an
    image is s_c(x) of the nearest concept, copied or not.
    """

    def __init__(
        self,
        domain: str,
        descriptor: str,
        references: str | dict[str, str],
        *,
        architecture: Annotated[str, ARCHITECTURE] = "module",
        threshold: Annotated[float, Field(gt=-1, lt=1)] = 0.5,
        size: PositiveInt = 288,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        others: OtherDomains | None = None,
        allow_pickle: list[str] | None = None,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            domain: of the memorised concepts.
            descriptor: the file of SSCD, nothing is fetched: a TorchScript file that maps images
                [B, 3, S, S] to [B, D], or the weights of a torchvision ResNet (the authors'
                .torchvision.pt, or the same as .safetensors).
            references: the memorised images: concept -> a folder, or one folder that has a folder
                per concept, named as it. Folders are read whole; images are cropped to their middle
                square, as models are trained on them.
            architecture: what the file is.
            threshold: cosine above which an image is a copy.
            size, mean, std: what the descriptor reads: pixels, and per channel for images in 0..1.
            others: what names the content of images in other domains; None: nothing does, and the
                sequence must not measure any (sequence.prompts without a column of the other
                domain).
            allow_pickle: files other than safetensors that may be read; a TorchScript file must be
                among them.

        Raises:
            ValueError: references that cannot be read. ModelError, WeightFileError: a descriptor
                that cannot be loaded.
        """
        self._domain, self._threshold, self._device = domain, threshold, device
        self._way = Preprocessing(size, tuple(mean), tuple(std), "bicubic")
        self._descriptor, self._architecture = descriptor, architecture
        allowed = allow_pickle or []
        self._network = load_descriptor(descriptor, architecture, allowed).to(device).eval()
        self._files = {
            label: find_pictures(folder, KEY) for label, folder in folders_of(references).items()
        }
        self._concepts = list(self._files)
        paths = [path for files in self._files.values() for path in files]
        batches = read_pictures(paths, size, TOGETHER, KEY)
        self._references = torch.cat([self.describe(batch) for batch in batches])  # [N, D]
        self._others = None
        if others is not None:
            if domain in others.labels:
                raise ValueError(
                    f"evaluator.others.labels.{domain}: is the domain of the memorised concepts, "
                    "which evaluator.references has; leave it out"
                )
            self._others = OpenClip(
                others.model,
                others.labels,
                path=others.path,
                templates=others.templates,
                allow_pickle=allowed,
                device=device,
            )

    @without_gradients
    def describe(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] in 0..1 to descriptors of length 1 [B, D].

        Raises:
            ModelError: a module makes something else of them.
        """
        found = self._network(self._way(images.to(self._device)))
        if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(images):
            raise ModelError(
                f"{self._descriptor}: must map {len(images)} images to as many rows of a descriptor"
            )
        return F.normalize(found.float(), dim=1)

    def similarities(self, images: Tensor) -> Tensor:
        """Return s_c of images [B, 3, S, S] in 0..1: [B, concepts], in the order of labels()."""
        cosines = self.describe(images) @ self._references.T  # [B, N]
        of_each = cosines.split([len(files) for files in self._files.values()], dim=1)
        return torch.stack([each.max(1).values for each in of_each], dim=1)

    def predict(self, images: Tensor) -> dict[str, Prediction]:
        """Map images [B, 3, S, S] in 0..1 to one Prediction per domain."""
        best = self.similarities(images).max(1)
        scores = best.values.tolist()
        labels = [
            self._concepts[place] if score > self._threshold else NONE
            for place, score in zip(best.indices.tolist(), scores, strict=True)
        ]
        found = self._others.predict(images) if self._others else {}
        return found | {self._domain: Prediction(labels, scores)}

    def labels(self) -> dict[str, list[str]]:
        """Return the labels that can be predicted, per domain; "none" is no concept."""
        found = self._others.labels() if self._others else {}
        return found | {self._domain: list(self._concepts)}

    def fingerprint(self) -> str:
        """Return the sha256 over the descriptor, what it reads, the threshold and the references.

        Of the references it is their content, by concept.
        """
        references = [
            [label, sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)]
            for label, files in sorted(self._files.items())
        ]
        way = [self._way.size, self._way.mean, self._way.std, self._way.interpolation]
        settings = [self._domain, self._architecture, self._threshold, *way, references]
        digest = hashlib.sha256(to_bytes(settings))
        if self._architecture == "module":  # its code is in the file
            digest.update(hashlib.sha256(Path(self._descriptor).expanduser().read_bytes()).digest())
        hash_weights(digest, self._network)
        if self._others:
            digest.update(self._others.fingerprint().encode())
        return digest.hexdigest()


def folders_of(references: str | dict[str, str]) -> dict[str, str]:
    """Return the folder of references of each concept.

    Raises:
        ValueError: there is none, or a concept has the name of no concept.
    """
    if isinstance(references, str):
        root = Path(references).expanduser()
        inside = sorted(root.iterdir()) if root.is_dir() else []
        folders = {path.name: str(path) for path in inside if path.is_dir()}
        if not folders:
            raise ValueError(
                f"{KEY}={references}: no such folder, or no folder in it; give a folder that has "
                "one per memorised concept, named as it, or concept: folder"
            )
    else:
        folders = references
        if not folders:
            raise ValueError(f"{KEY}: is empty; give the folder of each memorised concept")
    if NONE in folders:
        raise ValueError(
            f"{KEY}: {NONE!r} is the label of images that copy nothing; name that concept otherwise"
        )
    return folders


def load_descriptor(path: str, architecture: str, allow_pickle: list[str]) -> nn.Module:
    """Load a descriptor: a TorchScript file, or the weights of a torchvision ResNet.

    Raises:
        ModelError: weights that do not fit the architecture, or no TorchScript file.
        WeightFileError: the file is missing, damaged, or a pickle that is not allowed.
    """
    file = Path(path).expanduser()
    if architecture == "module":
        check_pickle(file, allow_pickle)
        try:
            network = torch.jit.load(file, map_location="cpu")
        except RuntimeError as error:
            raise ModelError(
                f"{path}: is no TorchScript file ({one_line(error)[:200]}); for a file of weights "
                "give evaluator.architecture=resnet50"
            ) from error
        check_finite(path, network.state_dict())
        return network
    weights = load_tensors(file, allow_pickle)
    if weights and all(name.startswith("backbone.") for name in weights):  # the authors' file
        weights = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
    if "fc.weight" not in weights or weights["fc.weight"].ndim != 2:
        raise ModelError(
            f"{path}: has no projection fc.weight, as the weights of SSCD for torchvision have; "
            "give the file whose name ends in .torchvision.pt"
        )
    network = make_resnet(architecture, len(weights["fc.weight"]))
    wanted = network.state_dict()
    weights = {name: t for name, t in wanted.items() if name.endswith(COMPUTED)} | weights
    for name, tensor in wanted.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ModelError(
                f"{path}: {name} is missing or has another shape than in {architecture}; "
                "correct evaluator.architecture"
            )
    refuse_strangers(path, sorted(set(weights) - set(wanted)))
    check_finite(path, weights)
    network.load_state_dict(weights)
    return network


def make_resnet(architecture: str, dims: int) -> nn.Module:
    """Make a torchvision ResNet with random weights that maps images to descriptors [B, dims].

    Its places are pooled by a generalised mean in place of the mean, and projected by its last
    layer (Pizzi et al. 2022).
    """
    import torchvision

    class GeneralisedMean(nn.Module):
        """(mean over places of x^p)^(1/p)   (Radenovic et al. 2018, arXiv 1711.02512, Eq. 3)."""

        def forward(self, maps: Tensor) -> Tensor:
            """Map activations [B, C, H, W] to [B, C]."""
            return maps.clamp(min=SMALLEST).pow(POWER).mean((2, 3)).pow(1 / POWER)

    network: nn.Module = getattr(torchvision.models, architecture)(num_classes=dims)
    network.avgpool = GeneralisedMean()
    return network
