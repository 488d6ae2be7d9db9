"""What a number was made on: device, memory, library versions, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

from cu_runner.runtime.devices import device_name
from cu_runner.runtime.lazy import torch
from cu_runner.runtime.paths import PACKAGE


def versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "numpy", "cu_runner")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from; None for an installed package."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git on this machine
        return None
    return found.stdout.strip() or None


def made_with(device: torch.device) -> dict[str, object]:
    """What step.json records of the machine and the code."""
    return {"versions": versions(), "device": device_name(device), "git_commit": git_commit()}
