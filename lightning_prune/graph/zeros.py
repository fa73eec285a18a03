"""Which values of a recorded forward are zero, because they come from a branch that has vanished."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_prune.graph.dataflow import Flow, Step, Value, shares_memory
from lightning_prune.utils.module_walk import named_modules
from lightning_prune.utils.stand_ins import Zero

__all__ = ["zero_values"]

#: Operators whose result is zero if their first tensor is.
_PRESERVING = {
    *(
        "clone",
        "_to_copy",
        "neg",
        "relu",
        "gelu",
        "silu",
        "tanh",
        "native_dropout",
        "roll",
        "index",
        "sum",
        "mean",
    ),
    *(
        "constant_pad_nd",
        "div",
        "copy",
        "contiguous",
        "flip",
        "repeat",
        "hardtanh",
        "hardswish",
        "leaky_relu",
    ),
    *(
        "permute",
        "avg_pool2d",
        "_adaptive_avg_pool2d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "convert",
    ),
}
#: Operators whose result is zero if one of their tensors is; everything else is taken to be finite.
_PRODUCTS = {"mul", "mm", "bmm", "matmul"}


def zero_values(flow: Flow, modules: Iterable[str] = ()) -> set[Value]:
    """Return the values that are zero whatever the input, as long as all others are finite.

    Args:
        flow: a recorded forward.
        modules: names of modules whose results are taken to be zero, besides those that have vanished.
    """
    sources = {name for name, module in named_modules(flow.model) if isinstance(module, Zero)}
    zeros = {value for name in modules for boundary in flow.calls_of.get(name, ()) for value in boundary.out}
    if not sources and not zeros:
        return set()
    for step in flow.steps:
        if step.call.module in sources or _is_zero(step, zeros):
            zeros.update(step.makes[:1])
    return zeros


def _is_zero(step: Step, zeros: set[Value]) -> bool:
    name = step.call.op._opname.rstrip("_")
    known = [value in zeros for value in step.reads]
    if not any(known):
        return False
    if name == "constant_pad_nd":
        return known[0] and not step.call.arg("value")
    if name in _PRODUCTS:
        return True
    if name in ("add", "sub", "cat", "stack"):
        return all(known)
    return known[0] and (name in _PRESERVING or shares_memory(step.call))
