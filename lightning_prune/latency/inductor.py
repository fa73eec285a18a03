"""A network as torch.compile runs it, and the operators that it leaves standing (level 3)."""

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

__all__ = ["compiled_operators", "compiled_whole"]

UNTAGGED = ("hardswish_", "hardsigmoid_")


def compiled_operators(graph: ChannelGraph) -> list[Operator]:
    """The operators of a network without those that become part of the kernel of the one before them.

    Inductor writes a chain of pointwise operators, and norms in eval mode, as one kernel that moves its entries once;
    the first of the chain stands for all.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
        >>> [each.op._opname for each in compiled_operators(trace(net, torch.zeros(1, 3, 16, 16)))]
        ['convolution', 'native_batch_norm', 'convolution']
    """
    found = operators(graph)
    return [
        each for each in found if each.source is None or not (_pointwise(each) and _pointwise(each.source))
    ]


def _pointwise(operator: Operator) -> bool:
    return torch.Tag.pointwise in operator.op.tags or operator.op._opname in {*EVAL_BATCH_NORMS, *UNTAGGED}


def compiled_whole(
    net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], threads: int
) -> TimedCall:
    """What runs a whole network once; it is compiled here.

    Raises:
        RuntimeError: it cannot be compiled, or not as a single graph.
    """

    def once() -> object:
        return net(*args, **kwargs)

    # torch keeps what it compiled by code object, and gives up silently after eight: each network gets its own.
    once.__code__ = once.__code__.replace()
    run: Callable[[], object] = torch.compile(once, fullgraph=True, dynamic=False)
    try:
        run()
    except Exception as error:
        raise RuntimeError(
            f"torch.compile cannot run {type(net).__name__}: {str(error).strip().splitlines()[0]}; it needs a C++ "
            "compiler (g++, or CXX=...), and a forward without graph breaks. Or take execution='eager'"
        ) from error
    return run
