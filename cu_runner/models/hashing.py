"""What a network is, as a hash: its weights, its configuration, how its tokenizer reads a text."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import nn, torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys of configurations that change no image and no judgement.
WITHOUT_EFFECT = (
    "_name_or_path",
    "_class_name",
    "_diffusers_version",
    "transformers_version",  # names, paths and versions
    "_use_default_values",  # which settings a file left out; their values are there
    "architectures",
    "model_type",
    "image_processor_type",  # the name of a class, which is hashed as it was chosen
    "dtype",
    "torch_dtype",  # in which the weights were saved; they are hashed themselves
    "id2label",
    "label2id",  # labels are hashed as they are used
)


# What of a tokenizer decides which token ids a text becomes, beside the rules of its backend.
READING = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "split_special_tokens",
    "special_tokens_map",
    "pad_token_id",
)


def hash_weights(digest: hashlib._Hash, network: nn.Module) -> None:
    """Feed every weight and buffer of a network to a hash, each with its name, shape and type."""
    for name, tensor in network.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )


def to_bytes(value: object) -> bytes:
    """Return canonical JSON, to be hashed."""
    return json.dumps(value, sort_keys=True, default=str).encode()


def describe(part: object, config: Mapping[str, object]) -> dict[str, object]:
    """Return the class of a component and its configuration, without what changes no image."""
    return {"class": type(part).__name__, "config": effective(config)}


def effective(value: object) -> object:
    """Return a configuration without the keys that change nothing, at any depth."""
    if isinstance(value, Mapping):
        return {
            str(key): effective(entry) for key, entry in value.items() if key not in WITHOUT_EFFECT
        }
    return [effective(entry) for entry in value] if isinstance(value, list | tuple) else value


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return all that decides which token ids a text becomes.

    Read from the object are vocabulary, merges, special tokens and lengths.
    """
    reading = {name: getattr(tokenizer, name) for name in READING}
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        return reading | {
            name: rule for name, rule in rules.items() if name not in ("truncation", "padding")
        }  # of its last call
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(
            path for path in Path(folder).iterdir() if path.name != "tokenizer_config.json"
        )
        contents = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    return reading | {"class": type(tokenizer).__name__, "files": contents, "added": added}


def describe_timm(architecture: str) -> list[object]:
    """Return what decides a timm network beside its weights.

    That is its name, and the arguments that a repository or directory brings.
    """
    import timm  # takes seconds

    source, _, place = architecture.partition(":")
    if source == "local-dir":
        config = json.loads((Path(place) / "config.json").read_text(encoding="utf-8"))
        return [config["architecture"], config.get("model_args", {})]
    return list(timm.models.load_model_config_from_hf(place)[1:]) if place else [architecture, {}]
