"""What the processes of a distributed run tell each other, so that all cut the same (level 3).

In a single process every function is the identity. With several, all of them must call it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

from torch import Tensor, distributed

__all__ = ["agreed", "average_", "gathered", "shared"]

T = TypeVar("T")


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gathered(value: T) -> list[T]:
    """The ``value`` of every process, by rank.

    Example:
        >>> gathered(3)
        [3]
    """
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found


def shared(value: T) -> T:
    """The ``value`` of the first process.

    Example:
        >>> shared([1, 2])
        [1, 2]
    """
    if world_size() == 1:
        return value
    held: list[Any] = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def agreed(what: str, value: Any) -> None:
    """Raise RuntimeError, in all processes, unless all hold the same ``value`` (anything JSON can write).

    Only digests are sent.

    Example:
        >>> agreed("the cut", {"conv.weight": [0, 2]})
    """
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    digests = gathered(digest)
    if len(set(digests)) > 1:
        apart = [rank for rank, other in enumerate(digests) if other != digests[0]]
        raise RuntimeError(
            f"{what} of ranks {apart} is not that of rank 0: the networks have come apart, and training cannot go "
            "on. Do all ranks build the same network, with the same sizes, before the trainer starts?"
        )


def average_(tensor: Tensor, weight: float) -> None:
    """The mean over processes in place, each counting by its ``weight``; unchanged if no weight is above 0.

    Example:
        >>> values = Tensor([1.0, 2.0])
        >>> average_(values, 3.0)
        >>> values
        tensor([1., 2.])
    """
    total = sum(gathered(weight))
    if world_size() > 1 and total > 0:
        tensor.mul_(weight / total)
        distributed.all_reduce(tensor)
