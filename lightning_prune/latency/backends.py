"""Executions: ways to run a network and its parts, so that both can be timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.latency.inductor import compiled_network, compiled_operators
from lightning_prune.latency.onnxruntime import empty_session, onnx_network, onnx_operators
from lightning_prune.latency.operators import operators
from lightning_prune.latency.timing import TimedCall
from lightning_prune.tracing.ids import Units

__all__ = ["EXECUTIONS", "Execution", "ExecutionName", "Piece", "package_versions", "random_inputs"]

ExecutionName = Literal["eager", "compiled", "onnx"]


class Piece(Protocol):
    """Part of a network that is timed on its own, with any number of channels.

    :class:`~lightning_prune.latency.operators.Operator` implements it. An *axis* is a set of units along which the
    piece shrinks; a count is the number of channels along it.
    """

    @property
    def signature(self) -> str:
        """Text that is equal for pieces that differ only in their numbers of channels."""

    @property
    def layer(self) -> str:
        """The layer that the time is added to."""

    @property
    def factors(self) -> Sequence[Units]:
        """Units of each axis."""

    @property
    def steps(self) -> Sequence[int]:
        """For each axis, a number that its counts must be a multiple of."""

    @property
    def multiples(self) -> Sequence[int]:
        """For each axis, a number whose multiples are run by another algorithm than other counts."""

    @property
    def dense_counts(self) -> tuple[int, ...]:
        """Count of each axis in the network as it was traced."""

    @property
    def on_grid(self) -> bool:
        """Whether the time is looked up by the counts of its axes; otherwise by its volume."""

    @property
    def is_contraction(self) -> bool:
        """Whether it contains a convolution or matrix product."""

    def volume(self, counts: Sequence[int]) -> int:
        """Return a rough number of its operations."""

    def parameters(self, counts: Sequence[int]) -> int:
        """Return the number of elements of the parameters that it reads."""

    def own_share(self, counts: Sequence[int], device: torch.device) -> float:
        """Return the share of its time alone that it also takes within a network."""

    def make_call(self, counts: Sequence[int], device: torch.device) -> TimedCall:
        """Return a call that runs it once with ``counts`` channels along each axis."""


@dataclass(frozen=True)
class Execution:
    """A way to run networks.

    Attributes:
        pieces: returns the parts of a traced network.
        network: (network in eval mode, positional and keyword inputs, threads) -> call that runs it once.
        packages: whose versions influence the time.
        empty_call: returns a call without any work, whose time is subtracted from each piece, if pieces have a cost
            per call that a network does not have for each piece.
    """

    pieces: Callable[[ChannelGraph], Sequence[Piece]]
    network: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], int], TimedCall]
    packages: tuple[str, ...] = ("torch",)
    empty_call: Callable[[torch.device], TimedCall] | None = None


def random_inputs(inputs: Any, device: torch.device) -> Any:
    """Return inputs on another device, with random numbers for floats, and zeros for other meta tensors."""

    def replace(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.rand(tensor.shape, dtype=tensor.dtype, device=device)
        return torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    return tree_map_only(Tensor, replace, inputs)


def _eager_network(
    net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], threads: int
) -> TimedCall:
    return partial(net, *args, **kwargs)


def package_versions(execution: ExecutionName) -> dict[str, str]:
    """Return the versions of the packages that run networks."""
    return {name: version(name) for name in EXECUTIONS[execution].packages}


EXECUTIONS: dict[ExecutionName, Execution] = {
    "eager": Execution(operators, _eager_network),
    "compiled": Execution(compiled_operators, compiled_network),
    "onnx": Execution(onnx_operators, onnx_network, ("torch", "onnx", "onnxruntime"), empty_session),
}
