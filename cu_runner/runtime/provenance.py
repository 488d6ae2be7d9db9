"""What a number was made on: device, library versions, commit."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cu_runner import __version__
from cu_runner.runtime.devices import device_name
from cu_runner.runtime.paths import PACKAGE

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Provenance:
    """The machine and the code that made a step.

    versions: of Python, the libraries and cu_runner. git_commit: None for an installed package.
    """

    versions: dict[str, str]
    device: str
    git_commit: str | None


def made_with(device: torch.device) -> Provenance:
    """Return what step.json records of the machine and the code."""
    whole = {"python": platform.python_version(), **library_versions(), "cu_runner": __version__}
    return Provenance(whole, device_name(device), git_commit())


@functools.cache
def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that this process computes with."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


@functools.cache
def git_commit() -> str | None:
    """Return the commit of the checkout that this process began with.

    None for an installed package.
    """
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return found.stdout.strip() or None
