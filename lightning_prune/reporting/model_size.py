"""Sizes of a network: MACs, parameters, bytes of its file, and measured latency."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.trace import trace
from lightning_prune.latency.timing import sample_times

__all__ = ["MeasuredSize", "Sizes", "compare", "file_size", "latency", "layer_widths", "sizes"]

WARM_UP = 5


@dataclass(frozen=True)
class Sizes:
    """Sizes of one network.

    Attributes:
        macs: multiply-accumulates of one forward on one sample.
        params: number of parameters.
        bytes: size of the file that ``torch.save(net.state_dict())`` writes.
        latency_ms: median milliseconds of one forward on one sample; None if not measured.
    """

    macs: int
    params: int
    bytes: int
    latency_ms: float | None = None


def file_size(net: nn.Module) -> int:
    """Return the number of bytes that ``torch.save(net.state_dict())`` writes.

    Example:
        >>> file_size(nn.Linear(100, 100)) - file_size(nn.Linear(100, 50)) >= 4 * 50 * 101 - 64
        True
    """
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def sizes(graph: ChannelGraph, net: nn.Module, latency_ms: float | None = None) -> Sizes:
    """Return the sizes of ``net``, the network of ``graph``."""
    params = sum(parameter.numel() for parameter in net.parameters())
    return Sizes(graph.cost("macs"), params, file_size(net), latency_ms)


def layer_widths(graph: ChannelGraph) -> dict[str, int]:
    """Return layer name -> number of filters, in the order of the forward."""
    return {name.removesuffix(".weight"): width for name, width in graph.widths().items()}


def latency(nets: Mapping[str, nn.Module], image: Tensor, runs: int = 30) -> dict[str, float]:
    """Return the median milliseconds of one forward of each network, measured in turns.

    In turns, changes of the machine's speed affect all networks alike. Every other round runs in reverse order, so
    that periodic disturbances do not always affect the same network.

    Args:
        nets: name -> network, on the device of ``image``; in eval mode during the measurement.
        image: the input, usually one sample.
        runs: measured forwards of each network, after five that are not measured.

    Example:
        >>> sorted(latency({"a": nn.Linear(2, 2), "b": nn.Linear(2, 1)}, torch.zeros(1, 2), runs=3))
        ['a', 'b']
    """
    modes = {name: net.training for name, net in nets.items()}
    calls = [partial(net.eval(), image) for net in nets.values()]
    with torch.inference_mode():
        samples = sample_times(calls, image.device, time.perf_counter_ns, WARM_UP + runs, gpu_queue=1)
    for name, net in nets.items():
        net.train(modes[name])
    return {
        name: statistics.median(net_samples[WARM_UP:]) / 1e6
        for name, net_samples in zip(nets, samples, strict=True)
    }


@dataclass(frozen=True)
class MeasuredSize:
    """Sizes of a network, and the filters of each of its layers."""

    sizes: Sizes
    widths: dict[str, int]


def compare(
    dense: nn.Module, pruned: nn.Module, image: Tensor, runs: int = 30
) -> tuple[MeasuredSize, MeasuredSize]:
    """Measure sizes and layer widths of both networks, and their latency unless ``runs`` is 0."""
    times = latency({"dense": dense, "pruned": pruned}, image, runs) if runs else {}
    return _measure(dense, image, times.get("dense")), _measure(pruned, image, times.get("pruned"))


def _measure(net: nn.Module, image: Tensor, latency_ms: float | None) -> MeasuredSize:
    graph = trace(net, image)
    return MeasuredSize(sizes(graph, net, latency_ms), layer_widths(graph))
