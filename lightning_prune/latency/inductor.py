"""Networks compiled by torch.compile, and the operators whose time counts there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.latency.operator_template import Operator
from lightning_prune.latency.operators import operators
from lightning_prune.latency.timing import TimedCall
from lightning_prune.tracing.operator_sets import EVAL_BATCH_NORMS

__all__ = ["compiled_network", "compiled_operators"]

#: pointwise, although torch does not tag them so
UNTAGGED = ("hardswish_", "hardsigmoid_")


def compiled_operators(graph: ChannelGraph) -> list[Operator]:
    """Return the operators of a network, without those that torch.compile fuses into the operator before them.

    Inductor writes a chain of pointwise operators, and norms in eval mode, as one kernel that reads and writes its
    tensors once. The first operator of the chain represents the whole chain.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
        >>> [operator.op._opname for operator in compiled_operators(trace(net, torch.zeros(1, 3, 16, 16)))]
        ['convolution', 'native_batch_norm', 'convolution']
    """
    return [operator for operator in operators(graph) if not _is_fused(operator)]


def _is_fused(operator: Operator) -> bool:
    return operator.source is not None and _is_pointwise(operator) and _is_pointwise(operator.source)


def _is_pointwise(operator: Operator) -> bool:
    return torch.Tag.pointwise in operator.op.tags or operator.op._opname in {*EVAL_BATCH_NORMS, *UNTAGGED}


def compiled_network(
    net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], threads: int
) -> TimedCall:
    """Compile a network and return a call that runs it once.

    Raises:
        RuntimeError: it cannot be compiled, or not as a single graph.
    """

    def forward() -> object:
        return net(*args, **kwargs)

    # torch caches compiled functions by code object and silently gives up after eight: each network gets its own.
    forward.__code__ = forward.__code__.replace()
    compiled: Callable[[], object] = torch.compile(forward, fullgraph=True, dynamic=False)
    try:
        compiled()
    except Exception as error:
        raise RuntimeError(
            f"torch.compile cannot run {type(net).__name__}: {str(error).strip().splitlines()[0]}; it needs a C++ "
            "compiler (g++, or CXX=...), and a forward without graph breaks. Or set execution='eager'"
        ) from error
    return compiled
