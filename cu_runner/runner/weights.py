"""The weights that a run trains: how they were in the untouched model, and what steps make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cu_runner.concepts.sequence import Sequence
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import assign, is_gate, snapshot
from cu_runner.regularizers.base import Regularizer
from cu_runner.runtime.lazy import torch
from cu_runner.runtime.returned import kind_of, refused
from cu_runner.store.files import read_delta, read_tensor

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class TrainedWeights:
    """params: by name, in training or set to what a step made. base: their values at first."""

    params: dict[str, nn.Parameter]
    base: dict[str, Tensor]
    device: torch.device

    @staticmethod
    def of(
        model: DiffusionModel,
        method: Method[Any],
        regularizers: Iterable[Regularizer] = (),
        sequence: Sequence | None = None,
    ) -> TrainedWeights:
        """Choose the weights; lower the others' precision as the model says.

        Args:
            sequence: of the run; needed by regularizers that have weights of their own.
        """
        params = choose(model, method, regularizers, sequence)
        model.lower_frozen(params)
        return TrainedWeights(params, snapshot(params), model.device)

    @property
    def are_gates(self) -> bool:
        """Tell whether these are gates: what opens none is read as before."""
        return bool(self.params) and all(map(is_gate, self.params))

    def place(self, delta: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a delta on the device, in the order of the weights.

        safetensors returns tensors in any order, and that of a sum is seen in its last digit.
        """
        return {name: delta[name].to(self.device) for name in self.params}

    def given_back(self, regularizer: Regularizer, delta: object) -> dict[str, Tensor]:
        """Return what post_request() gave, placed. Raises ReturnedError unless it fits."""
        wanted = "a finite change of every weight, by name, or None"
        if not isinstance(delta, Mapping):
            raise refused(regularizer, "post_request", kind_of(delta), wanted)
        for name, weight in self.params.items():
            found = delta.get(name)
            if not isinstance(found, torch.Tensor):
                raise refused(regularizer, "post_request", f"{kind_of(found)} for {name}", wanted)
            if found.shape != weight.shape:
                what = f"a tensor of shape {tuple(found.shape)} for {name}"
                raise refused(
                    regularizer, "post_request", what, f"one of shape {tuple(weight.shape)}"
                )
            if not found.isfinite().all():
                what = f"what is not finite for {name}"
                raise refused(regularizer, "post_request", what, wanted)
        return self.place(dict(delta))

    def read(self, path: Path) -> dict[str, Tensor]:
        """Read a delta from its file. Raises StoreError if it is not one of these weights."""
        return self.place(read_delta(path, self.base))

    def set(self, delta: dict[str, Tensor] | None = None) -> None:
        """Set the weights to the untouched model's, and add a delta."""
        assign(self.params, self.base, delta)


def choose(
    model: DiffusionModel,
    method: Method[Any],
    regularizers: Iterable[Regularizer] = (),
    sequence: Sequence | None = None,
) -> dict[str, nn.Parameter]:
    """Return the weights that requests change: a regularizer's own, else those of the method.

    Raises ValueError: there are none.
    """
    for regularizer in regularizers:
        if sequence is not None and regularizer.has_weights:
            return regularizer.own_weights(model, sequence, method)
    return method.weights(model)


def changes_so_far(earlier: list[Path], delta: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """Return what gives the changes of one weight by all requests, [requests, *shape].

    Args:
        earlier: delta.safetensors of the requests before, of which one tensor at a time is read.
        delta: of the last request, by name.
    """

    def changes(name: str) -> Tensor:
        found = torch.empty(len(earlier) + 1, *delta[name].shape)
        for row, file in enumerate(earlier):
            found[row] = read_tensor(file, name)
        found[-1] = delta[name]
        return found

    return changes
