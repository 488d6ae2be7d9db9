"""The device that a run works on: chosen, named, its peak memory."""

from __future__ import annotations

import os
import platform
import resource
import sys

from cu_runner.runtime.lazy import torch
from cu_runner.schema.settings import Spine


def choose_device(spine: Spine) -> str:
    """The device of a run, after setting torch's threads. Raises ValueError if it is not there."""
    import torch

    if spine.num_threads:
        torch.set_num_threads(spine.num_threads)
    device = spine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device={device}: no CUDA device is visible; use device=cpu or device=auto"
        )
    if device == "cuda":  # of several processes, each has a GPU of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device.startswith("cuda:") and int(device[5:]) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0"
        )
    return device


def peak_memory_mb(device: torch.device) -> float:
    """Peak device memory on a GPU; on a CPU the peak resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})"
    )
