"""The weights that a run trains: how they were in the untouched model, and what steps make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.parameters import assign, select_parameters, snapshot
from cu_runner.schema.settings import ParameterGroup
from cu_runner.store.files import read_delta

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class TrainedWeights:
    """params: by name, in training or set to what a step made. base: their values at first."""

    params: dict[str, nn.Parameter]
    base: dict[str, Tensor]
    device: torch.device

    @staticmethod
    def of(model: DiffusionModel, group: ParameterGroup) -> TrainedWeights:
        """Choose the weights of a group; lower the others' precision as the model says."""
        params = select_parameters(model.unet, group)
        model.lower_frozen(params)
        return TrainedWeights(params, snapshot(params), model.device)

    def place(self, delta: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a delta on the device, in the order of the weights.

        safetensors returns tensors in any order, and that of a sum is seen in its last digit.
        """
        return {name: delta[name].to(self.device) for name in self.params}

    def read(self, path: Path) -> dict[str, Tensor]:
        """Read a delta from its file. Raises StoreError if it is not one of these weights."""
        return self.place(read_delta(path, self.base))

    def set(self, delta: dict[str, Tensor] | None = None) -> None:
        """Set the weights to the untouched model's, and add a delta."""
        assign(self.params, self.base, delta)
