"""Libraries that take seconds to import, each imported when one of its names is first used.

Commands must answer at once: a typo, a plan or a finished table needs no torch. So the modules of
this package write `from cu_runner.runtime.lazy import torch` where others write `import torch`.
Type checkers see the libraries themselves.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    import diffusers
    import huggingface_hub
    import open_clip
    import pandas as pd
    import timm
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    import transformers
    from torch import nn
else:

    class Library:
        """A library's name, standing for it until one of its attributes is asked for."""

        def __init__(self, name: str) -> None:
            self._name, self._module = name, None

        def __getattr__(self, attribute: str) -> object:
            if self._module is None:
                self._module = importlib.import_module(self._name)
            return getattr(self._module, attribute)

    diffusers, huggingface_hub = Library("diffusers"), Library("huggingface_hub")
    open_clip, timm, transformers = Library("open_clip"), Library("timm"), Library("transformers")
    torch, nn, F = Library("torch"), Library("torch.nn"), Library("torch.nn.functional")
    dist, pd = Library("torch.distributed"), Library("pandas")

__all__ = [  # of the libraries, for type checkers
    "F",
    "diffusers",
    "dist",
    "huggingface_hub",
    "nn",
    "open_clip",
    "pd",
    "timm",
    "torch",
    "transformers",
    "without_gradients",
]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def without_gradients(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a function to run under torch.no_grad()."""

    @functools.wraps(function)
    def run(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        with torch.no_grad():
            return function(*arguments, **options)

    return run
