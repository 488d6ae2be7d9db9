"""What a class of the user's own gives back, held against what its base class asks for.

A wrong value is refused where it is taken, by class and method: later it would be an error of ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING

from cu_runner.runtime.lazy import torch
from cu_runner.schema.errors import ReturnedError

if TYPE_CHECKING:
    from torch import Tensor


def refused(source: object, method: str, what: str, wanted: str) -> ReturnedError:
    """Return the error for what a method gave back: its class, what it was, what to return."""
    return ReturnedError(f"{type(source).__name__}.{method} returns {what}; return {wanted}")


def kind_of(value: object) -> str:
    """Return the words for a value's type."""
    return "nothing" if value is None else f"a {type(value).__name__}"


def as_scalar(source: object, method: str, found: object) -> Tensor | None:
    """Return what is added to a loss: a tensor of one number with a gradient, or None.

    Raises:
        ReturnedError: it is anything else.
    """
    if found is None:
        return None
    wanted = "a tensor of one number, computed from the trained weights, or None"
    if not isinstance(found, torch.Tensor):
        raise refused(source, method, kind_of(found), wanted)
    if found.numel() != 1:
        raise refused(source, method, f"a tensor of {found.numel()} numbers", wanted)
    if not found.requires_grad:
        raise refused(source, method, "a tensor without gradient", wanted)
    return found


def as_record(source: object, method: str, found: object) -> dict[str, object]:
    """Return what a step's record can hold: texts, numbers, lists and mappings of them; {} of None.

    Tensors of one number become numbers.

    Raises:
        ReturnedError: it is anything else.
    """
    wanted = "a mapping of names to texts, numbers and lists of them, or nothing"
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise refused(source, method, kind_of(found), wanted)
    record = {name: plain(value) for name, value in found.items()}
    for name, value in record.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            what = f"{kind_of(value)} as {name!r}"
            raise refused(source, method, what, wanted) from None
    return record


def as_metrics(source: object, method: str, found: object) -> dict[str, float | int | None]:
    """Return names and numbers, None where one means nothing; tensors of one number become numbers.

    Raises:
        ReturnedError: it is anything else, or a number is not finite.
    """
    wanted = "a mapping of names to finite numbers, None for what means nothing"
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise refused(source, method, kind_of(found), wanted)
    numbers: dict[str, float | int | None] = {}
    for name, value in found.items():
        number = None if value is None else finite(value)
        if value is not None and number is None:
            raise refused(source, method, f"{shown(value)} as {name!r}", wanted)
        numbers[name] = number
    return numbers


def as_number(source: object, method: str, found: object, what: str) -> float:
    """Return one finite number. what: it is, in words. Raises ReturnedError."""
    number = finite(found)
    if number is None:
        raise refused(source, method, f"{shown(found)} as {what}", "a finite number")
    return float(number)


def plain(value: object) -> object:
    """Return a tensor of one number as that number, and anything else as it is."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def finite(value: object) -> float | int | None:
    """Return a number, or a tensor of one, that is finite; None of anything else."""
    one = plain(value)
    if not isinstance(one, Real) or not math.isfinite(one):
        return None
    return int(one) if isinstance(one, Integral) else float(one)


def shown(value: object) -> str:
    """Return a number as it is, and of anything else its type."""
    return f"{value}" if isinstance(value, Real) else kind_of(value)


def is_number(value: object) -> bool:
    """Tell whether a value is a number, finite or not."""
    return isinstance(value, Real)
