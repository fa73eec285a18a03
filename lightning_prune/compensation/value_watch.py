"""Follow which tensors of a forward have sizes that depend on values, such as the proposals of a detector.

Two networks give different numbers of them, or the same number of other ones, so that neither layers that read them
nor outputs made of them can be compared row by row. What can be compared are the last layers before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.tracing.calls import operator_tensors
from lightning_prune.tracing.value_sizes import size_depends_on_values

__all__ = ["CallKey", "ValueWatch"]

#: Name of a layer, and number of its call.
CallKey = tuple[str, int]

#: Operators that write into their first operand, whose size the result has.
_WRITES = ("index_add", "index_put", "index_copy", "scatter", "masked_scatter", "index_fill", "index_reduce")


class ValueWatch(TorchDispatchMode):
    """Follows sizes that depend on values while a network runs.

    Attributes:
        last_comparable: calls of layers whose results an operator with such sizes reads, with no other layer
            between, as keys of a dictionary in order.

    Example:
        >>> watch, x = ValueWatch(), torch.tensor([1.0, -1.0, 2.0])
        >>> with watch:
        ...     watch.on_layer(x, ("head", 0))
        ...     chosen = (x * 2)[x > 0] + 1
        >>> watch.has_value_size(chosen), watch.has_value_size(x), list(watch.last_comparable)
        (True, False, [('head', 0)])
    """

    def __init__(self) -> None:
        super().__init__()
        self.last_comparable: dict[CallKey, None] = {}
        self._value_sized = WeakTensorKeyDictionary()
        self._layers = WeakTensorKeyDictionary()  # tensor -> the last layers' calls that it was computed from

    def has_value_size(self, tensor: Tensor) -> bool:
        """Return whether the size of ``tensor`` depends on values."""
        return tensor in self._value_sized

    def on_layer(self, output: Tensor, call: CallKey) -> None:
        """Note that ``output`` is the result of a layer that can be compared."""
        self._layers[output] = {call: None}

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and hand on what is known of its operands."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operands, results = operator_tensors((*args, *kwargs.values())), operator_tensors((out,))
        fixed = [tensor for tensor in operands if tensor not in self._value_sized]
        layers = {call: None for tensor in fixed for call in self._layers.get(tensor, ())}
        behind_values = len(fixed) < len(operands) and not _has_size_of_fixed(func, fixed, results)
        if behind_values or size_depends_on_values(func, args, kwargs):
            self.last_comparable.update(layers)
            self._note(self._value_sized, results, True)
        elif layers:
            self._note(self._layers, results, layers)
        return out

    def _note(self, notes: WeakTensorKeyDictionary, results: Iterable[Tensor], note: Any) -> None:
        for tensor in results:
            notes[tensor] = note


def _has_size_of_fixed(func: OpOverload, fixed: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
    """Return whether the results have the size of an operand that does not depend on values, not just by chance."""
    name = func._schema.name.partition("::")[2].rstrip("_")
    keeps_size = torch.Tag.pointwise in func.tags or name.startswith(_WRITES)
    return keeps_size and all(any(x.shape == tensor.shape for x in fixed) for tensor in results)
