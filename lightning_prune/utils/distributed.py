"""Communication between the processes of a distributed run, so that all of them make the same cuts.

In a single process every function returns its input. In a distributed run every process must call it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor, distributed

from lightning_prune.utils.hashing import json_digest

__all__ = ["average_", "broadcast", "check_agreement", "from_first", "gather_all", "is_first", "warn_first"]

if distributed.is_available():
    # These functions take the default group as a default value, which is bound when they are imported. Tracing
    # imports them through `torch._dynamo`: after `init_process_group` they would hold the group, and the threads
    # of gloo with it, beyond `destroy_process_group`, and such a thread can abort a process that ends.
    import torch.distributed.nn.functional  # noqa: F401

T = TypeVar("T")

_ALONE = ContextVar("alone", default=False)  # whether the other processes wait for this one in `from_first`


def world_size() -> int:
    """Return the number of processes; 1 within :func:`from_first`, since the others wait for its end."""
    if _ALONE.get() or not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def gather_all(value: T) -> list[T]:
    """Return the ``value`` of every process, in the order of ranks.

    Example:
        >>> gather_all(3)
        [3]
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Return the ``value`` of the process with rank 0.

    Example:
        >>> broadcast([1, 2])
        [1, 2]
    """
    if world_size() == 1:
        return value
    values: list[Any] = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def is_first() -> bool:
    """Return whether this is the process with rank 0, or the only one."""
    return world_size() == 1 or distributed.get_rank() == 0


def warn_first(message: str, stacklevel: int = 1) -> None:
    """Warn in the process with rank 0 only; ``stacklevel`` 1 names the caller."""
    if is_first():
        warnings.warn(message, stacklevel=stacklevel + 1)


def from_first(compute: Callable[[], T]) -> T:
    """Run ``compute`` in the process with rank 0 only, and return its result, or raise its error, in all of them.

    The functions of this module that ``compute`` calls take rank 0 for the only process.

    Example:
        >>> from_first(lambda: 3)
        3
    """
    if world_size() == 1:
        return compute()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if distributed.get_rank() == 0:
        try:
            with _alone():
                outcome = (compute(), None)
        except Exception as error:
            outcome = (None, error)
    value, failure = broadcast(outcome)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


@contextmanager
def _alone() -> Iterator[None]:
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def check_agreement(name: str, value: Any) -> None:
    """Raise RuntimeError in all processes unless they have the same ``value``; only digests are sent.

    Args:
        name: what ``value`` is, for the error.
        value: anything that JSON can write.

    Example:
        >>> check_agreement("the cut", {"conv.weight": [0, 2]})
    """
    digests = gather_all(json_digest(value))
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise RuntimeError(
            f"{name} of ranks {different} differs from that of rank 0, so training must stop. Make sure that all "
            "ranks build the same network, with the same sizes, before the trainer starts"
        )


def average_(tensor: Tensor, weight: float) -> None:
    """Replace ``tensor`` by its weighted mean over processes; leave it unchanged if no weight is above 0.

    Args:
        tensor: of the same shape in all processes; changed in place.
        weight: of this process.

    Example:
        >>> values = Tensor([1.0, 2.0])
        >>> average_(values, 3.0)
        >>> values
        tensor([1., 2.])
    """
    total = sum(gather_all(weight))
    if world_size() > 1 and total > 0:
        tensor.mul_(weight / total)
        distributed.all_reduce(tensor)
