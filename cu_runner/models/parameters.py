"""Parameter groups, snapshots, deltas and drift norms.

Pure functions on dicts of tensors keyed by parameter name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cu_runner.models.architectures import Roles, architecture_of
from cu_runner.models.quantised import is_quantised
from cu_runner.runtime.lazy import nn, torch, without_gradients
from cu_runner.schema.settings import ParameterGroup

if TYPE_CHECKING:
    from torch import Tensor

# A weight counts as moved when it differs from the base by more than this (released code of Lee et
# al. 2026).
MOVED = 6e-5
# The groups whose weights all read the text, and may be linear in it.
TEXT_WEIGHTS: tuple[ParameterGroup, ...] = ("kv_xattn", "k_xattn", "v_xattn", "text_linear")


def is_gate(name: str) -> bool:
    """Tell whether these are weights of cu_runner.models.gates, which are in no group."""
    return name.endswith((".gate_directions", ".gate_values"))


def belongs(name: str, group: ParameterGroup, roles: Roles) -> bool:
    """Tell whether a denoiser's parameter of this name is in the group, by what its weights do."""
    if is_gate(name):
        return False
    keys, values, in_cross_attention, text, linear = (
        pattern.search(name) is not None
        for pattern in (roles.keys, roles.values, roles.attention, roles.text, roles.linear)
    )
    # layers are linear ones, convolutions, and normalisations, which are named so
    normalises = "norm" in name.rpartition(".")[0].rpartition(".")[2]
    return {
        "kv_xattn": keys or values,
        "k_xattn": keys,
        "v_xattn": values,
        "reads_text": text,
        "text_linear": linear,
        "xattn": in_cross_attention,
        "non_xattn": not in_cross_attention,
        "full": True,
        "non_xattn_layers": not in_cross_attention and not normalises,
        "layers": not normalises,
    }[group]


def select_parameters(denoiser: nn.Module, group: ParameterGroup) -> dict[str, nn.Parameter]:
    """Return the parameters of a group, in the order of the module.

    kv_xattn: keys and values of attention to the text; k_xattn, v_xattn: one of the two. xattn: all
    of attention to the text. reads_text: whatever reads nothing but the text. text_linear: weights
    that are linear in what the text encoder puts out: keys and values of a UNet, and of a
    transformer the layer by which the text enters. non_xattn: all but xattn. full: every parameter.
    non_xattn_layers and layers: the same as the two before, without normalisation layers.
    """
    roles = architecture_of(denoiser).roles
    chosen = {
        name: parameter
        for name, parameter in denoiser.named_parameters()
        if belongs(name, group, roles)
    }
    if not chosen:
        raise ValueError(
            f"method.params={group}: {type(denoiser).__name__} has no such parameters; it needs "
            "attention to a text. method.params=full trains all weights, layers all but "
            "normalisations"
        )
    if held := [name for name, parameter in chosen.items() if is_quantised(parameter)]:
        raise ValueError(
            f"method.params={group}: {held[0]} is held in eight bits and cannot be trained; use "
            "model.quantised=null, or a group that reads the text: kv_xattn, xattn, reads_text, "
            "text_linear"
        )
    return chosen


def snapshot(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies that later training does not change."""
    return {name: parameter.detach().clone() for name, parameter in params.items()}


def gradients(params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return .grad by name, itself and not a copy, of the parameters that have one."""
    return {
        name: parameter.grad for name, parameter in params.items() if parameter.grad is not None
    }


def subtract(params: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return theta - theta_base, tensor by tensor."""
    return {name: parameter.detach() - base[name] for name, parameter in params.items()}


@without_gradients
def assign(
    params: Mapping[str, nn.Parameter],
    base: Mapping[str, Tensor],
    delta: Mapping[str, Tensor] | None = None,
) -> None:
    """Set theta to theta_base + delta, in place; no delta is the base itself."""
    for name, parameter in params.items():
        parameter.copy_(base[name] if delta is None else base[name] + delta[name])


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask [n] exactly `count` of the scores [n]: the largest; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(len(scores) - count + 1).values
    chosen = scores > threshold
    tied = (scores == threshold).nonzero().flatten()
    chosen[tied[: count - int(chosen.sum())]] = True
    return chosen


@contextmanager
def placed(params: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> Iterator[None]:
    """Set theta to other weights for the length of a block, and then back."""
    now = snapshot(params)
    assign(params, weights)
    try:
        yield
    finally:
        assign(params, now)


@dataclass(frozen=True)
class Drift:
    """Size of a weight change d over all trainable weights.

    l2: sqrt(sum d^2). l1: sum |d|. fraction: of weights with |d| > MOVED.
    """

    l2: float
    l1: float
    fraction: float


def drift(delta: dict[str, Tensor]) -> Drift:
    """Measure a delta.

    Norms are accumulated in float64, so that they do not depend on how the weights are split into
    tensors.
    """
    flat = torch.cat([change.detach().double().flatten() for change in delta.values()])
    moved = (flat.abs() > MOVED).double().mean()
    return Drift(l2=flat.norm().item(), l1=flat.abs().sum().item(), fraction=moved.item())
