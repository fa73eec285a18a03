"""Watch for sums that read a layer's output: the residual streams of a network."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.utils.batch_norm import tracked_norms

__all__ = ["SUMS", "WITHOUT_EFFECT", "SumWatch", "Summand", "are_alike"]

Payload = TypeVar("Payload")

SUMS = frozenset(("add", "add_", "__add__", "__radd__", "__iadd__"))
WITHOUT_EFFECT = frozenset(
    ("dropout", "__get__", "size", "dim", "numel", "is_floating_point", "zeros_like", "ones_like")
)
_LAST = 8  # summands that are waited for at the same time


@dataclass
class Summand(Generic[Payload]):
    """An output of a layer that a sum may read, directly or behind a batch norm.

    Attributes:
        output: what the sum reads; a weak reference.
        payload: what :meth:`SumWatch.expect` got with the layer's output.
        norm: the batch norm between layer and sum.
        is_read: whether anything else has read it.
    """

    output: weakref.ref[Tensor]
    payload: Payload
    norm: nn.Module | None = None
    is_read: bool = False


class SumWatch(TorchFunctionMode, Generic[Payload]):
    """Call ``on_sum(summand, output, other)`` before each sum that is the first to read an expected output.

    ``on_sum`` may change ``output`` in place. Of two expected outputs in a sum, the later one is meant.

    Args:
        on_sum: see above.
    """

    def __init__(self, on_sum: Callable[[Summand[Payload], Tensor, Tensor], None]) -> None:
        super().__init__()
        self.on_sum = on_sum
        self.expected: deque[Summand[Payload]] = deque(maxlen=_LAST)

    def expect(self, output: Tensor, payload: Payload, norm: nn.Module | None = None) -> None:
        """Watch for sums that read ``output``."""
        self.expected.append(Summand(weakref.ref(output), payload, norm))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch within this block, in which ``model`` runs."""
        with ExitStack() as hooks:
            for norm in tracked_norms(model):
                hooks.callback(norm.register_forward_hook(self._after_norm).remove)
            with self:
                yield

    def _after_norm(self, norm: nn.Module, args: Any, output: Tensor) -> None:
        """Expect a norm's output in place of its input."""
        for summand in self.expected:
            if summand.norm is None and args and summand.output() is args[0]:
                self.expect(output, summand.payload, norm)
                return

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch; a sum after ``on_sum``."""
        name = getattr(func, "__name__", "")
        if name in SUMS and are_alike(args) and not kwargs:
            self._before_sum(*args[:2])
        elif name not in WITHOUT_EFFECT:
            for summand in self.expected:
                summand.is_read |= any(arg is summand.output() for arg in args if isinstance(arg, Tensor))
        return func(*args, **(kwargs or {}))

    def _before_sum(self, first: Tensor, second: Tensor) -> None:
        for summand in reversed(self.expected):
            output = summand.output()
            if output is not None and not summand.is_read and (output is first or output is second):
                payload = summand.payload
                kept = [each for each in self.expected if each.payload is not payload]
                self.expected = deque(kept, maxlen=_LAST)
                self.on_sum(summand, output, second if output is first else first)
                return


def are_alike(args: Any) -> bool:
    """Whether a function adds two tensors of the same shape."""
    return len(args) == 2 and all(isinstance(x, Tensor) for x in args) and args[0].shape == args[1].shape
