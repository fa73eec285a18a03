"""Watch for activations that are the only readers of a layer's output, directly, behind a batch norm or behind a sum.

A rectifier gives the same for all values below zero. Where the dense network's value lies there, a repaired layer
need not give that value, but any below zero (Zhang et al., "Accelerating very deep convolutional networks for
classification and detection", 2015, fit layers with the rectifier behind them in mind).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_prune.compensation.sums import SUMS, WITHOUT_EFFECT, are_alike
from lightning_prune.utils.batch_norm import tracked_norms

__all__ = ["ActivationWatch", "Chain", "Interval"]

Payload = TypeVar("Payload")

#: The values outside of which an activation is constant: lower and upper end.
Interval = tuple[float, float]

_LOWER = {"relu": 0.0, "relu_": 0.0, "hardswish": -3.0, "hardswish_": -3.0}
_CLAMPS = frozenset(("hardtanh", "hardtanh_"))


@dataclass
class Chain(Generic[Payload]):
    """A layer's output, followed to the activation that reads it.

    Attributes:
        payload: what :meth:`ActivationWatch.expect` got.
        norm: the batch norm on the way.
        in_sum: whether a sum is on the way.
        interval: of the activation; None: there is none, or something else reads a value on the way too.
    """

    payload: Payload
    norm: nn.Module | None = None
    in_sum: bool = False
    interval: Interval | None = None
    is_broken: bool = False
    values: list[weakref.ref[Tensor]] = field(default_factory=list)

    def reads(self, values: Sequence[Any]) -> bool:
        """Whether one of ``values`` is on the way."""
        return any(
            value is each for each in (ref() for ref in self.values) for value in values if each is not None
        )

    def ends_in(self, value: Any) -> bool:
        """Whether ``value`` is the present end of the way."""
        return isinstance(value, Tensor) and bool(self.values) and self.values[-1]() is value

    def follow(self, value: Tensor) -> None:
        """Go on with ``value``, which is computed from the present end."""
        self.values.append(weakref.ref(value))


class ActivationWatch(TorchFunctionMode, Generic[Payload]):
    """Follow outputs of layers to their activations.

    Attributes:
        chains: of all outputs, in the order of their calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chains: list[Chain[Payload]] = []

    def expect(self, output: Tensor, payload: Payload) -> None:
        """Follow ``output``."""
        self.chains.append(Chain(payload, values=[weakref.ref(output)]))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch within this block, in which ``model`` runs."""
        with ExitStack() as hooks:
            for norm in tracked_norms(model):
                hooks.callback(norm.register_forward_hook(self._after_norm).remove)
            with self:
                yield

    def _open(self, values: Sequence[Any]) -> list[Chain[Payload]]:
        """Return the chains that one of ``values`` belongs to."""
        return [chain for chain in self.chains if not chain.is_broken and chain.reads(values)]

    def _after_norm(self, norm: nn.Module, args: Any, output: Tensor) -> None:
        """Go on with a norm's output; the call itself has been taken for one by another reader."""
        for chain in self.chains:
            if args and chain.norm is None and not chain.in_sum and chain.ends_in(args[0]):
                chain.norm, chain.is_broken = norm, chain.is_broken or chain.interval is not None
                chain.follow(output)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in WITHOUT_EFFECT or name == "batch_norm":
            return func(*args, **kwargs)
        chains = self._open(tree_leaves((args, kwargs)))
        result = func(*args, **kwargs)
        for chain in chains:
            self._continue(chain, name, args, kwargs, result)
        return result

    def _continue(self, chain: Chain[Payload], name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Update a chain, one of whose values a function has read."""
        interval = _interval(name, args, kwargs)
        is_first = chain.interval is None and any(map(chain.ends_in, args))
        if is_first and interval is not None:
            chain.interval = interval
            if chain.ends_in(result):  # in place: later readers read the activation's result
                chain.values.pop()
        elif is_first and name in SUMS and are_alike(args) and not kwargs and not chain.in_sum:
            chain.in_sum = True
            if not chain.ends_in(result):
                chain.follow(result)
        else:
            chain.is_broken = True


def _interval(name: str, args: Any, kwargs: Any) -> Interval | None:
    """Return where an activation is not constant; None if the function is no such activation."""
    if name in _LOWER:
        return _LOWER[name], math.inf
    if name == "relu6":
        return 0.0, 6.0
    if name in _CLAMPS:
        lower = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
        upper = args[2] if len(args) > 2 else kwargs.get("max_val", 1.0)
        return float(lower), float(upper)
    return None
