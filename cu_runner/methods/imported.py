"""A checkpoint that another tool unlearned, in place of a method: measured like one.

Its one request is for all targets of the sequence. The weights that differ from the base model's
are those that the run has; delta.safetensors holds their change, and the run needs the checkpoint
no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.gates import DIRECTIONS, add_gates
from cu_runner.models.parameters import is_gate
from cu_runner.models.unlearned import Holds, hash_checkpoint, read_unlearned
from cu_runner.request.scope import Scope
from cu_runner.runtime.lazy import nn, without_gradients
from cu_runner.schema.errors import ModelError
from cu_runner.schema.words import Matches

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Sha256 = Annotated[str, Matches(r"[0-9a-f]{64}", "the sha256 of the checkpoint, 64 digits")]


class Imported(Method[dict[str, "Tensor"]]):
    """Set the weights to those of a checkpoint."""

    closed_form = True
    whole_sequence = True
    params = "full"

    def __init__(
        self,
        checkpoint: str,
        sha256: Sha256 | None = None,
        holds: Holds | None = None,
        allow_pickle: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            checkpoint: a diffusers directory, a single file of the original layout, a LoRA, or a
                file of weights by name, or of changes of them.
            sha256: of it, as hash_checkpoint() makes it; it is another run with another one.
            holds: what a file of weights by name holds; None finds out.
            allow_pickle: the files that may be read although they are pickles.
        """
        self.checkpoint, self.sha256, self.holds = checkpoint, sha256, holds
        self.allow_pickle = allow_pickle

    def weights(self, model: DiffusionModel) -> dict[str, nn.Parameter]:
        """Read the checkpoint; return the weights in which it differs from the base model.

        Raises:
            ModelError, WeightFileError: it cannot be read as a change of this model, is another
                than the sha256 says, or differs in nothing.
        """
        if self.sha256 is not None and hash_checkpoint(self.checkpoint) != self.sha256:
            raise ModelError(f"{self.checkpoint}: has another sha256 than method.sha256 says")
        found = read_unlearned(self.checkpoint, model, self.holds, self.allow_pickle)
        self._form = found.form
        self._change = {name: each for name, each in found.change.items() if each.any()}
        if not self._change:
            raise ModelError(
                f"{self.checkpoint}: its {model.architecture.word} is that of the base model"
            )
        if not any(map(is_gate, self._change)):
            params = dict(model.denoiser.named_parameters())
            self._change = {name: self._change[name] for name in params if name in self._change}
            return {name: params[name] for name in self._change}
        number = next(len(each) for name, each in found.change.items() if name.endswith(DIRECTIONS))
        gates = add_gates(model.denoiser, number)
        if gates.keys() != found.change.keys():
            raise ModelError(f"{self.checkpoint}: holds gates of another {model.architecture.word}")
        self._change = found.change
        return gates

    def batch(self, scope: Scope, step: int) -> dict[str, Tensor]:
        """Return the change of the weights."""
        return {name: self._change[name].to(each.device) for name, each in scope.params.items()}

    @without_gradients
    def backward(self, scope: Scope, batch: dict[str, Tensor]) -> dict[str, float]:
        """Take the weights, which update() sets; there is no loss."""
        self._new = {name: scope.base[name] + change for name, change in batch.items()}
        return {"loss": 0.0}

    @without_gradients
    def update(self, scope: Scope, optimizer: Optimizer) -> None:
        """Set the weights."""
        for name, parameter in scope.params.items():
            parameter.copy_(self._new[name])

    def end_request(self, scope: Scope) -> dict[str, object]:
        """Return what the checkpoint was read as, for step.json."""
        return {"form": self._form, "weights": len(self._change), "sha256": self.sha256}
