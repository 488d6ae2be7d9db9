"""What a regularizer may do; every hook defaults to doing nothing. The list order of regularizers is the order of every hook."""

from torch import Tensor, nn

from cu_runner.methods.base import Scope


class Regularizer:
    """Hooks of one request, in the order in which they are called."""

    def begin_request(self, scope: Scope) -> dict[str, object]:
        """Prepare for a request. Returns what the run directory should record of it (lists, numbers), or nothing."""
        return {}

    def penalty(self, params: dict[str, nn.Parameter]) -> Tensor | None:
        """A scalar to add to the loss, or None."""
        return None

    def on_gradients(self, params: dict[str, nn.Parameter]) -> None:
        """Change the gradients in place, before clipping."""

    def on_step(self, params: dict[str, nn.Parameter], before: dict[str, Tensor]) -> None:
        """Change the weights in place after the optimiser's step; before: their values ahead of the step."""

    @property
    def edits_step(self) -> bool:
        """True if on_step needs `before`; the loop keeps no copy of the weights otherwise."""
        return False
