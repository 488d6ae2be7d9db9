"""Image-text models (CLIP and its kin) through open_clip.

Images and texts become unit vectors in one space.

Shapes: B batch, S image side, N texts, E embedding width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from cu_runner.models.checkpoint_files import locate
from cu_runner.models.hashing import describe, describe_tokenizer, effective, hash_weights, to_bytes
from cu_runner.models.weight_files import check_finite, check_pickle
from cu_runner.runtime.lazy import F, open_clip, torch, transformers, without_gradients
from cu_runner.schema.errors import ModelError, one_line
from cu_runner.schema.json_files import parse_json

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from torch import Tensor


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ImageTextSource:
    """Where an image-text model comes from.

    model: an architecture that open_clip knows ("ViT-L-14"), the path of a model configuration of
    one's own (.json), an open_clip directory (open_clip_config.json, weights and, for a tokenizer
    of its own, its files), or "hf-hub:OWNER/NAME".
    path: the weight file of the first two; the others bring their own. allow_pickle: weight files
    other than safetensors that may be read.
    """

    model: str
    path: str | None = None
    allow_pickle: tuple[str, ...] = ()


class ImageTextModel:
    """A loaded model, in fp32, with the size and the normalisation that it was trained with."""

    def __init__(
        self,
        network: open_clip.CLIP,
        tokenizer: SimpleTokenizer | HFTokenizer,
        description: dict[str, object],
        device: str,
    ) -> None:
        """Take a network, and in the description what of it is no weight."""
        self._network = network.to(device).eval().requires_grad_(False)
        self._tokenizer, self._description, self._device = tokenizer, description, device
        preprocess = network.visual.preprocess_cfg
        side = preprocess["size"]
        self._size = (side, side) if isinstance(side, int) else tuple(side)
        self._interpolation = preprocess["interpolation"]
        self._mean, self._std = (
            torch.tensor(preprocess[key], device=device).view(1, -1, 1, 1)
            for key in ("mean", "std")
        )

    @property
    def scale(self) -> float:
        """Return the trained inverse temperature: logits are this times the cosine."""
        return float(self._network.logit_scale.exp().item())

    @without_gradients
    def embed_images(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] in 0..1 to unit vectors [B, E]."""
        if images.shape[-2:] != self._size:
            images = F.interpolate(
                images, size=self._size, mode=self._interpolation, antialias=True
            ).clamp(0, 1)
        inputs = (images.to(self._device) - self._mean) / self._std
        return F.normalize(self._network.encode_image(inputs).float(), dim=-1)

    @without_gradients
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Map N texts to unit vectors [N, E]; what is longer than the model reads is cut."""
        batches = [texts[start : start + 256] for start in range(0, len(texts), 256)]
        rows = [
            self._network.encode_text(self._tokenizer(batch).to(self._device)).float()
            for batch in batches
        ]
        return F.normalize(torch.cat(rows), dim=-1)

    def fingerprint(self) -> str:
        """Return the sha256 over weights, configuration, preprocessing and tokenizer."""
        preprocessing = [self._size, self._interpolation, self._mean.tolist(), self._std.tolist()]
        digest = hashlib.sha256(
            to_bytes([self._description, preprocessing, describe_reader(self._tokenizer)])
        )
        hash_weights(digest, self._network)
        return digest.hexdigest()


def load_image_text(source: ImageTextSource, device: str) -> ImageTextModel:
    """Load a model whose weights must be complete.

    Raises:
        ModelError: an unknown architecture, a missing or damaged file, weights that do not fit.
            WeightFileError: a weight file that is missing, or a pickle that allow_pickle does not
            name.
    """
    name, weights = find_parts(source)
    try:
        with quiet_root_logger():
            network = open_clip.create_model(name, load_weights=False, pretrained_text=False)
            open_clip.load_checkpoint(network, str(weights), weights_only=True)
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, torch and transformers raise many types
        reason = one_line(error)[:300]
        raise ModelError(f"{source.model}: cannot be loaded by open_clip ({reason})") from error
    check_finite(weights, network.state_dict())
    towers = [
        module for module in network.modules() if isinstance(module, transformers.PreTrainedModel)
    ]
    description = {
        "config": effective(open_clip.get_model_config(name)),
        "towers": [describe(tower, tower.config.to_dict()) for tower in towers],
    }
    return ImageTextModel(network, tokenizer, description, device)


def describe_reader(tokenizer: SimpleTokenizer | HFTokenizer) -> list[object]:
    """Return what decides which token ids an open_clip tokenizer makes of a text."""
    common = [type(tokenizer).__name__, tokenizer.context_length, tokenizer.clean_fn.__name__]
    if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
        return [
            *common,
            tokenizer.strip_sep_token,
            tokenizer.tokenizer_mode,
            describe_tokenizer(tokenizer.tokenizer),
        ]
    return [*common, tokenizer.encoder, list(tokenizer.bpe_ranks)]


def find_parts(source: ImageTextSource) -> tuple[str, Path]:
    """Find the name under which open_clip builds the architecture, and the weight file.

    Raises:
        ModelError: there is no such model, or nothing to load. WeightFileError: a weight file that
            is missing, or a pickle that is not allowed.
    """
    name, hub = source.model, source.model.removeprefix("hf-hub:")
    if hub != name:
        try:
            weights = Path(open_clip.pretrained.download_pretrained_from_hf(hub))
        except Exception as error:  # network, hub and cache errors of several libraries
            reason = one_line(error)[:200]
            raise ModelError(
                f"{name}: cannot be downloaded ({reason}); give a local open_clip directory"
            ) from error
    elif name in open_clip.list_models():
        weights = given_weights(source)
    elif name.endswith(".json"):
        file = locate(name)
        check_config(file, json_key=None)
        open_clip.add_model_config(file)
        name, weights = file.stem, given_weights(source)
    elif "/" in name:
        folder = locate(name)
        check_config(folder / "open_clip_config.json", json_key="model_cfg")
        name, weights = f"local-dir:{folder}", weights_in(folder)
    else:
        raise ModelError(
            f"{name}: open_clip knows no such architecture; give one such as ViT-L-14, a .json of "
            "your own, an open_clip directory or hf-hub:OWNER/NAME"
        )
    check_pickle(weights, source.allow_pickle)
    return name, weights


def weights_in(folder: Path) -> Path:
    """Return the weight file of an open_clip directory; safetensors come first.

    Raises:
        ModelError: there is none, or more than one that could be it.
    """
    kinds = ("safetensors", "bin", "pth", "pt")
    found = [path for kind in kinds for path in sorted(folder.glob(f"*.{kind}"))]
    # it may hold the same model as transformers keeps it, too
    best = [path for path in found if path.name.startswith("open_clip")] or found
    if not best:
        raise ModelError(
            f"{folder}: holds no weight file; an open_clip directory has "
            "open_clip_model.safetensors"
        )
    first, *others = [path for path in best if path.suffix == best[0].suffix]
    if others:
        raise ModelError(
            f"{folder}: holds {first.name} and {others[0].name}; name the one that is meant "
            f"open_clip_model{first.suffix}"
        )
    return first


def given_weights(source: ImageTextSource) -> Path:
    """Return the weight file of an architecture. Raises ModelError for none."""
    if source.path is None:
        raise ModelError(
            f"{source.model}: is an architecture without weights; give the path of a weight file"
        )
    return locate(source.path)


def check_config(file: Path, json_key: str | None) -> None:
    """Raise ModelError unless the file describes an open_clip model.

    Args:
        json_key: where in the file the description is; None: it is all of it.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        complete = {"embed_dim", "vision_cfg", "text_cfg"} <= set(
            content[json_key] if json_key else content
        )
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ModelError(
            f"{file}: describes no open_clip model; it must be JSON with embed_dim, vision_cfg and "
            "text_cfg"
        )


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Silence the root logger: open_clip reports through it, which would print to the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
