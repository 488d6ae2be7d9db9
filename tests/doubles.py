"""A method that stands for the real ones."""

from torch import Tensor

from cu_runner.methods.base import Method
from cu_runner.request.scope import Scope


class Pull(Method[int]):
    """Half the squared distance of every weight to 1, times a factor per step; the gradient is
    factor * (theta - 1).
    """

    def __init__(
        self, events: list[str] | None = None, factors: tuple[float, ...] = (1.0,)
    ) -> None:
        self.events, self.factors = events if events is not None else [], factors

    def begin_request(self, scope: Scope) -> None:
        self.events.append("method.begin")

    def batch(self, scope: Scope, step: int) -> int:
        self.events.append(f"batch {step}")
        return step

    def loss(self, scope: Scope, batch: int) -> tuple[Tensor, dict[str, float]]:
        self.events.append("loss")
        factor = self.factors[min(batch, len(self.factors) - 1)]
        return factor * 0.5 * sum(((weight - 1) ** 2).sum() for weight in scope.params.values()), {
            "factor": factor
        }

    def on_gradients(self, params) -> None:
        self.events.append("method.on_gradients")
