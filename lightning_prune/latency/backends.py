"""Ways to run a network and its parts, so that both can be timed (level 3)."""

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
from lightning_prune.latency.inductor import compiled_operators, compiled_whole
from lightning_prune.latency.onnxruntime import onnx_idle, onnx_operators, onnx_whole
from lightning_prune.latency.operators import operators
from lightning_prune.latency.timing import TimedCall
from lightning_prune.tracing.ids import Units

__all__ = ["EXECUTIONS", "Execution", "ExecutionName", "Piece", "random_on", "versions_of"]

ExecutionName = Literal["eager", "compiled", "onnx"]


class Piece(Protocol):
    """What is timed on its own, with any number of channels; :class:`~lightning_prune.latency.operators.Operator` is one."""

    @property
    def signature(self) -> str:
        """Equal for pieces that differ in their numbers of channels only."""

    @property
    def layer(self) -> str:
        """The layer that its time is booked to."""

    @property
    def factors(self) -> Sequence[Units]:
        """Units of each axis."""

    @property
    def steps(self) -> Sequence[int]:
        """What the count of each axis must be a multiple of."""

    @property
    def multiples(self) -> Sequence[int]:
        """Of each axis; a count that is a multiple of it, and one that is not, are run in different ways."""

    @property
    def most(self) -> tuple[int, ...]:
        """The count of each axis in the network as it was traced."""

    @property
    def on_grid(self) -> bool:
        """Whether its time is looked up by its axes; otherwise by its volume."""

    @property
    def contracts(self) -> bool:
        """Whether it is a convolution or matrix product, maybe among other things."""

    def volume(self, counts: Sequence[int]) -> int:
        """How much it has to do, roughly."""

    def parameters(self, counts: Sequence[int]) -> int:
        """How many entries the parameters have that it reads."""

    def share(self, counts: Sequence[int], device: torch.device) -> float:
        """Share of a run's time that it also takes within a network."""

    def run(self, counts: Sequence[int], device: torch.device) -> TimedCall:
        """What runs it once with ``counts`` channels along each axis."""


@dataclass(frozen=True)
class Execution:
    """How a network is run.

    Attributes:
        pieces: its parts.
        whole: (network in eval mode, positional and keyword inputs, threads) -> what runs it once.
        packages: whose versions matter.
        idle: what takes as long as a piece does beyond its work, if a network does not take it for each.
    """

    pieces: Callable[[ChannelGraph], Sequence[Piece]]
    whole: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], int], TimedCall]
    packages: tuple[str, ...] = ("torch",)
    idle: Callable[[torch.device], TimedCall] | None = None


def random_on(value: Any, device: torch.device) -> Any:
    """Inputs on another device; random numbers in the place of floats, also of those that have no data."""

    def moved(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.rand(tensor.shape, dtype=tensor.dtype, device=device)
        return torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    return tree_map_only(Tensor, moved, value)


def _eager(net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], threads: int) -> TimedCall:
    return partial(net, *args, **kwargs)


def versions_of(execution: ExecutionName) -> dict[str, str]:
    """Of what runs networks."""
    return {name: version(name) for name in EXECUTIONS[execution].packages}


EXECUTIONS: dict[ExecutionName, Execution] = {
    "eager": Execution(operators, _eager),
    "compiled": Execution(compiled_operators, compiled_whole),
    "onnx": Execution(onnx_operators, onnx_whole, ("torch", "onnx", "onnxruntime"), onnx_idle),
}
