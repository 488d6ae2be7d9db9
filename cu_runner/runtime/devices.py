"""The device that a run works on: chosen, named, its peak memory."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import torch

if TYPE_CHECKING:
    from cu_runner.schema.settings import Spine

# Of NVIDIA's driver, of AMD's, and of Windows' for Linux.
GPU_FILES = ("nvidia[0-9]*", "kfd", "dxg")
DEVICES = Path("/dev")


def has_gpu() -> bool:
    """Tell whether torch finds a GPU.

    It is asked only where the machine has the file of one: importing torch takes seconds, and a
    plan or a finished table on a machine without a GPU must not wait for it.
    """
    if not any(path for name in GPU_FILES for path in DEVICES.glob(name)):
        return False
    return torch.cuda.is_available()


def choose_device(spine: Spine) -> str:
    """Choose the device of a run. Raises ValueError if it is not there."""
    device = spine.device
    if device == "auto":
        device = "cuda" if has_gpu() else "cpu"
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(
            f"device={device}: no CUDA device is visible; use device=cpu or device=auto"
        )
    if device == "cuda":  # of several processes, each has a GPU of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if int(device.removeprefix("cuda:")) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    return device


def limit_threads(num_threads: int | None) -> None:
    """Set how many CPU threads torch computes with; None leaves it to torch."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak device memory on a GPU; on a CPU the peak resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak_memory(device: torch.device) -> None:
    """Begin a new peak on a GPU; that of a CPU process cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.init()  # before anything was on it there is no peak to reset
        torch.cuda.reset_peak_memory_stats(device)


def device_name(device: str | torch.device) -> str:
    """Name a device as step.json records it: a GPU by its model, a CPU by its architecture."""
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{kind} ({platform.machine()})"
