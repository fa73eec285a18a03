"""See the steps of optimizers in a training loop of anybody's, by the hooks that torch has for all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_prune.surgery.optimizer_buffers import base_optimizers

__all__ = ["StepWatch", "as_optimizers", "check_optimizers"]


_WATCHES: weakref.WeakSet[StepWatch] = weakref.WeakSet()


class StepWatch:
    """Calls a function before each step of any optimizer that holds parameters of a network.

    Loops hold optimizers in wrappers, or build them anew, so that none can be asked for beforehand. The watch ends
    with :meth:`close`, or with the object that owns ``on_step``.

    Args:
        model: the network.
        on_step: a bound method, called with the optimizer.

    Attributes:
        active: whether steps are watched; set by the owner.
        stepped: optimizers that have stepped since :meth:`forget`.

    Example:
        >>> import torch
        >>> class Log(list):
        ...     def add(self, optimizer):
        ...         self.append(type(optimizer).__name__)
        >>> net, log = nn.Linear(1, 1), Log()
        >>> watch = StepWatch(net, log.add)
        >>> torch.optim.SGD(net.parameters(), lr=0.1).step()
        >>> watch.close()
        >>> log
        ['SGD']
    """

    def __init__(self, model: nn.Module, on_step: Callable[[Optimizer], None]) -> None:
        self.model, self.active = weakref.ref(model), True
        self.stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._on_step = weakref.WeakMethod(on_step)
        _watch_all_optimizers()
        _WATCHES.add(self)

    def see(self, optimizer: Optimizer) -> None:
        """Note that ``optimizer`` is about to step."""
        call = self._on_step()
        if self.active and call and (optimizer in self.stepped or self.holds_parameters(optimizer)):
            self.stepped.add(optimizer)
            call(optimizer)

    def holds_parameters(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer holds a parameter of the network."""
        model = self.model()
        own = set() if model is None else {id(parameter) for parameter in model.parameters()}
        return any(id(parameter) in own for parameter in parameters_of(optimizer))

    def forget(self) -> None:
        """Forget the optimizers that have stepped."""
        self.stepped.clear()

    def close(self) -> None:
        """Watch no more."""
        _WATCHES.discard(self)


@cache
def _watch_all_optimizers() -> None:
    """Register the one hook of this process. It stays: torch is not done with its hooks when an object goes."""

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for watch in list(_WATCHES):
            watch.see(optimizer)

    register_optimizer_step_pre_hook(hook)


def parameters_of(optimizer: Optimizer) -> Iterable[Tensor]:
    """Yield the parameters that an optimizer holds."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def as_optimizers(optimizers: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """Return one optimizer, several, or none as a list.

    Raises:
        ValueError: something else is among them.

    Example:
        >>> as_optimizers(None)
        []
    """
    if optimizers is None:
        return []
    several = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    if not isinstance(several, Iterable) or not all(isinstance(each, Optimizer) for each in list(several)):
        raise ValueError(
            f"give the optimizer, or a list of all optimizers, that train the network; got {optimizers!r}"
        )
    return list(several)


def check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer], stepped: Iterable[Optimizer]) -> None:
    """Raise ValueError unless ``optimizers`` are those that train the network.

    Args:
        model: the network.
        optimizers: whose state would be cut along.
        stepped: optimizers that have changed parameters of the network.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in optimizers:
        if own.isdisjoint(map(id, parameters_of(optimizer))):
            raise ValueError(
                f"the {type(optimizer).__name__} holds no parameter of the network that is pruned: the training loop "
                "has built one of them anew, or wraps a copy. Make the Pruner of the model that is trained, after "
                "the loop has built it, and give step() its optimizer; nothing was cut"
            )
    given = {id(each.state) for optimizer in optimizers for each in (optimizer, *base_optimizers(optimizer))}
    others = sorted({type(each).__name__ for each in stepped if id(each.state) not in given})
    if others:
        names = ", ".join(type(each).__name__ for each in optimizers) or "none"
        raise ValueError(
            f"an optimizer that was not given to step() trains the network ({', '.join(others)}; given: {names}): "
            "its state would keep the sizes from before the cut. Give step() all optimizers as they are now; the "
            "loop may have built new ones. Nothing was cut"
        )
