"""Several processes as one: `accelerate launch --num_processes N`, on N devices or N CPU processes.

The split is inside the model. Of every batch that goes through the UNet each process takes its
share of the rows, and all get the outputs of all rows; gradients are averaged where they leave the
graph. Whatever stands around the model (losses, masks, multipliers, the optimiser) is computed by
every process, on the same numbers, and need not know. Evaluation is split by whole batches instead,
so that its images are bitwise those of one process. The first process alone writes files.

With one process every function here does nothing.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from cu_runner.runtime.lazy import dist, nn, torch

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

_alone = False  # inside alone(): the model's batches are this process's own


def start(device: str) -> None:
    """Join the other processes, where a launcher has started several.

    They talk through NCCL between GPUs, and through gloo between CPU processes. The group is left
    before the interpreter is taken down: gloo's threads that still hold tensors then abort the
    process.

    Args:
        device: as configured, "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: one GPU, or too few, for several processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1 or _joined():
        return
    if device.startswith("cuda:"):
        raise ValueError(
            f"device={device}: each of {processes} processes has a GPU of its own; "
            "use device=cuda, auto or cpu"
        )
    on_gpus = device != "cpu" and torch.cuda.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if on_gpus and here > torch.cuda.device_count():
        raise ValueError(
            f"device={device}: {here} processes and {torch.cuda.device_count()} CUDA devices; "
            "start at most one process for each, or use device=cpu"
        )
    from accelerate import PartialState  # seconds of import that a single process is spared

    atexit.register(PartialState(cpu=not on_gpus).destroy_process_group)
    if not is_main():
        os.environ["TQDM_DISABLE"] = "1"


def _joined() -> bool:
    """Return whether this process is of a group. Without torch none is, and it takes seconds."""
    return "torch.distributed" in sys.modules and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0 on."""
    return dist.get_rank() if _joined() else 0


def size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Return whether this is the process that writes files and talks to the terminal."""
    return rank() == 0


def from_main(make: Callable[[], Value]) -> Value:
    """Return in all processes what the first makes; an error that it meets is raised in all."""
    if size() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = make()
        except Exception as error:  # the others would wait for ever
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].told = not is_main()  # the first process says it
        raise outcome[1]
    return outcome[0]


def in_turn(own: Value) -> list[Value]:
    """Return what every process has, in their order."""
    if size() == 1:
        return [own]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, own)
    return found


def any_of(flag: bool) -> bool:
    """Return whether the flag is true in one of the processes."""
    return any(in_turn(flag))


@contextmanager
def alone() -> Iterator[None]:
    """Do not share what goes through the model here: every process has batches of its own."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def is_shared() -> bool:
    """Return whether several processes make every batch of the model together."""
    return size() > 1 and not _alone


def share(rows: int) -> slice | None:
    """Return this process's share of a batch.

    None where it takes all rows: one process, alone(), or fewer rows than processes.
    """
    if not is_shared() or rows < size():
        return None
    ends = share_ends(rows)
    return slice(ends[rank()], ends[rank() + 1])


def share_ends(rows: int) -> list[int]:
    """Return where the share of each process begins, and where the last one ends."""
    return [rows * number // size() for number in range(size() + 1)]


def gather(own: Tensor, rows: int) -> Tensor:
    """Return the outputs [rows, ...] of all shares, given this process's [own, ...].

    Gradients flow back into this process's own.
    """
    from cu_runner.runtime.gather import Gather  # a class of torch's

    gathered: Tensor = Gather.apply(own, share_ends(rows), rank())
    return gathered


@contextmanager
def averaged_gradients(params: list[nn.Parameter]) -> Iterator[None]:
    """Make every gradient with respect to a parameter the mean over the processes.

    This holds for those of backward() and of autograd.grad alike.
    """
    if size() == 1:
        yield
        return

    def average(gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total / size()

    handles = [parameter.requires_grad_(True).register_hook(average) for parameter in params]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
