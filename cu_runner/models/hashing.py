"""What a network is, as a hash: its weights, its configuration, how its tokenizer reads a text."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.models.parameters import is_gate
from cu_runner.models.quantised import plain_parts
from cu_runner.runtime.lazy import nn, timm, torch
from cu_runner.schema.json_files import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys of configurations that change no image and nothing that is seen in one.
WITHOUT_EFFECT = (
    # names, paths and versions
    "_name_or_path",
    "_class_name",
    "_diffusers_version",
    "transformers_version",
    # which settings a file left out; their values are there
    "_use_default_values",
    # the names of classes, which are hashed as they were chosen
    "architectures",
    "model_type",
    "image_processor_type",
    # in which the weights were saved; they are hashed themselves
    "dtype",
    "torch_dtype",
    # labels, which are hashed as they are used
    "id2label",
    "label2id",
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
    """Feed every weight and buffer of a network to a hash, each with its name, shape and type.

    Gates that are all zero change no image and are left out (cu_runner.models.gates).
    """
    for name, tensor in network.state_dict().items():
        if is_gate(name) and not tensor.any():
            continue
        for part in plain_parts(tensor.detach()):
            digest.update(f"{name}{tuple(part.shape)}{part.dtype}".encode())
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


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
        rules = parse_json(tokenizer.backend_tokenizer.to_str())
        of_last_call = ("truncation", "padding")
        return reading | {name: rule for name, rule in rules.items() if name not in of_last_call}
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
    source, _, place = architecture.partition(":")
    if source == "local-dir":
        config = parse_json((Path(place) / "config.json").read_text(encoding="utf-8"))
        return [config["architecture"], config.get("model_args", {})]
    return list(timm.models.load_model_config_from_hf(place)[1:]) if place else [architecture, {}]
