"""What a network costs: MACs, parameters, bytes in a file, and measured latency (level 3)."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.trace import trace

__all__ = ["MeasuredSize", "Sizes", "compare", "file_size", "latency", "layer_widths", "sizes"]

WARM_UP = 5


@dataclass(frozen=True)
class Sizes:
    """What one network costs.

    Attributes:
        macs: multiply-accumulates of one forward on one sample.
        params: parameters.
        bytes: length of the file that ``torch.save(net.state_dict())`` writes.
        latency_ms: median milliseconds of one forward on one sample, or None if it was not measured.
    """

    macs: int
    params: int
    bytes: int
    latency_ms: float | None = None


def file_size(net: nn.Module) -> int:
    """Bytes that ``torch.save(net.state_dict())`` writes.

    Example:
        >>> file_size(nn.Linear(100, 100)) - file_size(nn.Linear(100, 50)) >= 4 * 50 * 101 - 64
        True
    """
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def sizes(graph: ChannelGraph, net: nn.Module, latency_ms: float | None = None) -> Sizes:
    """The sizes of ``net``, which ``graph`` is the graph of."""
    params = sum(parameter.numel() for parameter in net.parameters())
    return Sizes(graph.cost("macs"), params, file_size(net), latency_ms)


def layer_widths(graph: ChannelGraph) -> dict[str, int]:
    """Filters of every layer, in the order of the forward, by the layer's name."""
    return {name.removesuffix(".weight"): width for name, width in graph.widths().items()}


def latency(nets: Mapping[str, nn.Module], image: Tensor, runs: int = 30) -> dict[str, float]:
    """Median milliseconds of one forward of each net, measured in turns so that all see the same machine.

    Every other round goes backwards, lest something that comes and goes with the rounds hits one net only.

    Args:
        nets: name -> network, on the device of ``image``; in eval mode while measured.
        image: the input, usually one sample.
        runs: forwards of each that count; five more come first.

    Example:
        >>> sorted(latency({"a": nn.Linear(2, 2), "b": nn.Linear(2, 1)}, torch.zeros(1, 2), runs=3))
        ['a', 'b']
    """
    modes = {name: net.training for name, net in nets.items()}
    times: dict[str, list[float]] = {name: [] for name in nets}
    with torch.inference_mode():
        for turn in range(WARM_UP + runs):
            for name in reversed(list(nets)) if turn % 2 else nets:
                times[name].append(_milliseconds(nets[name].eval(), image))
    for name, net in nets.items():
        net.train(modes[name])
    return {name: statistics.median(found[WARM_UP:]) for name, found in times.items()}


def _milliseconds(net: nn.Module, image: Tensor) -> float:
    _wait(image)
    start = time.perf_counter()
    net(image)
    _wait(image)
    return 1000 * (time.perf_counter() - start)


def _wait(image: Tensor) -> None:
    if image.is_cuda:
        torch.cuda.synchronize(image.device)


@dataclass(frozen=True)
class MeasuredSize:
    """What :func:`compare` finds out about one network."""

    sizes: Sizes
    widths: dict[str, int]


def compare(
    dense: nn.Module, pruned: nn.Module, image: Tensor, runs: int = 30
) -> tuple[MeasuredSize, MeasuredSize]:
    """Sizes and widths of both networks; latencies measured in turns, unless ``runs`` is 0."""
    times = latency({"dense": dense, "pruned": pruned}, image, runs) if runs else {}
    return _measured(dense, image, times.get("dense")), _measured(pruned, image, times.get("pruned"))


def _measured(net: nn.Module, image: Tensor, latency_ms: float | None) -> MeasuredSize:
    graph = trace(net, image)
    return MeasuredSize(sizes(graph, net, latency_ms), layer_widths(graph))
