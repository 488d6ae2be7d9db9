"""One image classifier per domain.

It is a transformers directory, a timm architecture with a weight file, or open_clip without
training.

Shapes: B batch, S image side, K labels of a domain.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from cu_runner.concepts.entries import cleaned, comparable
from cu_runner.evaluators.base import Evaluator, Faceless, Prediction
from cu_runner.evaluators.faces import FaceDetector, FaceSettings
from cu_runner.evaluators.labels import check_label_maps, read_labels
from cu_runner.evaluators.open_clip import OpenClip
from cu_runner.models.checkpoint_files import locate
from cu_runner.models.component_files import load_weights
from cu_runner.models.hashing import describe, describe_timm, hash_weights, to_bytes
from cu_runner.models.preprocessing import Interpolation, Preprocessing, choose_preprocessing
from cu_runner.models.weight_files import COMPUTED, check_finite, load_tensors, refuse_strangers
from cu_runner.runtime.lazy import nn, timm, torch, transformers, without_gradients
from cu_runner.schema.errors import ModelError, one_line

if TYPE_CHECKING:
    from torch import Tensor


class Classifier(Evaluator):
    """Predicts the most probable label of each domain."""

    def __init__(
        self,
        paths: dict[str, str],
        size: PositiveInt | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        *,
        architectures: dict[str, str] | None = None,
        labels: dict[str, str | list[str]] | None = None,
        templates: dict[str, list[str]] | None = None,
        interpolation: Interpolation | None = "bilinear",
        allow_pickle: list[str] | None = None,
        faces: FaceSettings | None = None,
        faceless: Faceless = "excluded",
        device: str = "cpu",
    ) -> None:
        """
        Args:
            paths: domain -> classifier directory or weight file; `package:...` is one inside the
                installed package.
            size: image side that the classifiers read, in pixels; other sizes are resized with
                anti-aliasing. None is each classifier's own, as are mean, std and interpolation:
                of a transformers directory that of preprocessor_config.json, of timm that which the
                architecture was trained with.
            mean, std: of each colour channel, for images in 0..1.
            architectures: domain -> what a weight file belongs to, `timm:NAME` or `open_clip:NAME`,
                or `open_clip` for an open_clip directory. Any other directory is one of
                transformers. open_clip has a size and a normalisation of its own.
            labels: domain -> the labels in the order of the outputs: themselves, a shipped list, a
                text file, or imagenet. A transformers directory may bring its own.
            templates: domain -> prompts with {label}, where open_clip predicts.
            allow_pickle: weight files other than safetensors that may be read.
            faces: finds the images whose labels count in one domain; None: all count.
            faceless: with faces, what images without one count for. "excluded": they leave UA alone
                and are wrong for retained concepts. "forgotten", as released: a concept without any
                face is forgotten, and retained concepts are measured on images with a face.

        Raises:
            ModelError: a directory or file is missing, incomplete, or does not fit its architecture
                or labels. WeightFileError: a pickle that allow_pickle does not name. ValueError: a
                setting for a domain that is not in paths.
        """
        architectures, labels = architectures or {}, labels or {}
        for key, domains in (
            ("architectures", architectures),
            ("labels", labels),
            ("templates", templates or {}),
            ("faces", [faces.domain] if faces else []),
        ):
            if strangers := [domain for domain in domains if domain not in paths]:
                raise ValueError(
                    f"evaluator.{key}: {strangers[0]} is no domain of evaluator.paths "
                    f"({', '.join(paths)})"
                )
        named = {
            domain: read_labels(f"evaluator.labels.{domain}", source)
            for domain, source in labels.items()
        }
        self._networks: dict[str, tuple[nn.Module, list[str]]] = {}
        self._descriptions: dict[str, object] = {}  # what of a network is no weight
        self._preprocessing: dict[str, Preprocessing] = {}
        # as runs record them
        channels = [None if values is None else [[[[v]] for v in values]] for values in (mean, std)]
        self._settings = [size, *channels, interpolation]
        self._zero_shot: dict[str, OpenClip] = {}
        for domain, path in paths.items():
            kind, _, name = architectures.get(domain, "transformers").partition(":")
            if kind == "timm" and locate(path).is_dir():
                kind = "transformers"
            if kind not in ("transformers", "timm", "open_clip") or (kind == "timm" and not name):
                raise ValueError(
                    f"evaluator.architectures.{domain}={architectures[domain]}: allowed: "
                    "timm:NAME, open_clip:NAME, open_clip; a transformers directory needs none"
                )
            if kind != "transformers" and domain not in named:
                raise ValueError(
                    f"evaluator.labels.{domain} is not set; {kind} weights do not name their "
                    "outputs"
                )
            if kind == "open_clip":  # without an architecture, path is a directory
                model, weights = (name, path) if name else (str(locate(path)), None)
                self._zero_shot[domain] = OpenClip(
                    model,
                    {domain: named[domain]},
                    path=weights,
                    templates=templates,
                    allow_pickle=allow_pickle,
                    device=device,
                )
                continue
            if kind == "timm":
                network = load_timm(name, path, len(named[domain]), allow_pickle or [])
                self._descriptions[domain] = describe_timm(name)
            else:
                check_label_maps(locate(path))
                network = load_weights(transformers.AutoModelForImageClassification, locate(path))
                self._descriptions[domain] = describe(network, network.config.to_dict())
            outputs = check_outputs(path, network, named.get(domain))
            self._networks[domain] = (network.to(device).eval(), outputs)
            self._preprocessing[domain] = choose_preprocessing(
                "evaluator",
                str(locate(path)),
                network,
                size=size,
                mean=None if mean is None else tuple(mean),
                std=None if std is None else tuple(std),
                interpolation=interpolation,
            )
        self._detector = FaceDetector(faces, device) if faces else None
        self._faceless = faceless

    @without_gradients
    def predict(self, images: Tensor) -> dict[str, Prediction]:
        """Map images [B, 3, S, S] in 0..1 to one Prediction per domain."""
        predictions = {
            domain: zero_shot.predict(images)[domain]
            for domain, zero_shot in self._zero_shot.items()
        }
        inputs = {way: way(images) for way in set(self._preprocessing.values())}
        for domain, (network, names) in self._networks.items():
            output = network(inputs[self._preprocessing[domain]])
            logits = output if isinstance(output, torch.Tensor) else output.logits
            best = logits.float().softmax(1).max(1)
            predictions[domain] = Prediction(
                [names[index] for index in best.indices.tolist()], best.values.tolist()
            )
        if self._detector:
            domain = self._detector.domain
            found = self._detector.find(images)
            predictions[domain] = only_faces(predictions[domain], found, self._faceless)
        return predictions

    def labels(self) -> dict[str, list[str]]:
        """Return the labels that can be predicted, per domain."""
        labels = {domain: names for domain, (_, names) in self._networks.items()}
        for zero_shot in self._zero_shot.values():
            labels |= zero_shot.labels()
        return labels

    def fingerprint(self) -> str:
        """Return the sha256 over all networks, their labels, and what else decides predictions."""
        digest = hashlib.sha256(to_bytes(self._settings))
        for domain, (network, names) in sorted(self._networks.items()):
            digest.update(to_bytes([domain, names, self._descriptions[domain]]))
            if None in self._settings:
                digest.update(to_bytes(asdict(self._preprocessing[domain])))
            hash_weights(digest, network)
        for domain, zero_shot in sorted(self._zero_shot.items()):
            digest.update(f"{domain}{zero_shot.fingerprint()}".encode())
        if self._detector:
            detector = f"{self._detector.domain}{self._detector.fingerprint()}{self._faceless}"
            digest.update(detector.encode())
        return digest.hexdigest()


def only_faces(prediction: Prediction, faces: list[bool], faceless: Faceless) -> Prediction:
    """Return the same without labels where there is no face."""
    labels = [label if face else "" for label, face in zip(prediction.labels, faces, strict=True)]
    scores = [score if face else 0.0 for score, face in zip(prediction.scores, faces, strict=True)]
    return Prediction(labels, scores, faces, faceless)


def check_outputs(path: str, network: nn.Module, labels: list[str] | None) -> list[str]:
    """Return the labels of a network's outputs in order.

    Those in a transformers directory must not contradict a given list. A directory may spell labels
    otherwise, or not know them (LABEL_0); it contradicts a list that has one of its labels
    elsewhere.

    Raises:
        ModelError: another number of labels than of outputs, or the directory has a label at
            another output.
    """
    if not isinstance(network, transformers.PreTrainedModel):
        assert labels is not None
        return labels
    own = [cleaned(network.config.id2label[index]) for index in range(network.config.num_labels)]
    if "" in own and labels is None:
        raise ModelError(
            f"{path}: output {own.index('')} has no label in its config.json; give "
            "evaluator.labels in the order of the outputs"
        )
    if labels is None:
        if repeated := [label for index, label in enumerate(own) if label in own[:index]]:
            raise ModelError(
                f"{path}: {repeated[0]} stands for two outputs in its config.json; give "
                "evaluator.labels in the order of the outputs"
            )
        return own
    if len(labels) != len(own):
        raise ModelError(
            f"{path}: has {len(own)} outputs and the label list {len(labels)} labels; they must be "
            "as many"
        )
    theirs, ours = ([comparable(label) for label in names] for names in (own, labels))
    for index, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if our != their and our in theirs:
            raise ModelError(
                f"{path}: output {index} is {own[index]!r} in its config.json and "
                f"{labels[index]!r} in the label list, which is its output {theirs.index(our)}; "
                "put the list in its order"
            )
    return labels


def load_timm(architecture: str, path: str, num_labels: int, allow_pickle: list[str]) -> nn.Module:
    """Load a timm network with the weights of a file.

    Raises:
        ModelError: an unknown architecture, or weights that do not fit it. WeightFileError: a file
            that cannot be read.
    """
    try:
        network = timm.create_model(architecture, pretrained=False, num_classes=num_labels)
    except RuntimeError as error:
        raise ModelError(
            f"timm:{architecture}: {one_line(error)}; timm.list_models() has all names"
        ) from None
    wanted = network.state_dict()
    # files of older versions lack what layers compute by themselves
    weights = {name: tensor for name, tensor in wanted.items() if name.endswith(COMPUTED)}
    weights |= load_tensors(locate(path), allow_pickle)
    head = f"{network.pretrained_cfg['classifier']}."
    for name, tensor in wanted.items():
        if name not in weights:
            raise ModelError(
                f"{path}: lacks {name} of {architecture}; the file belongs to another architecture"
            )
        if weights[name].shape != tensor.shape and name.startswith(head):
            raise ModelError(
                f"{path}: has {len(weights[name])} outputs and the label list {num_labels} labels; "
                "they must be as many"
            )
        if weights[name].shape != tensor.shape:
            raise ModelError(
                f"{path}: {name} is {list(weights[name].shape)}, that of {architecture} is "
                f"{list(tensor.shape)}"
            )
    refuse_strangers(path, sorted(set(weights) - set(wanted)))
    check_finite(path, weights)
    network.load_state_dict({name: weights[name] for name in wanted})
    return network
