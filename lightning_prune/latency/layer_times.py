"""Time the operators of networks as they are, so that the latency of each layer is known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.latency.operators import operators
from lightning_prune.latency.profiler import TURNS, BackendSettings, TimedPiece
from lightning_prune.latency.timing import clock_for, turn_order, undisturbed_time

__all__ = ["LayerTimes", "NotMeasured", "layer_times"]


class NotMeasured(RuntimeError):
    """The layers were not timed; the text says why."""


@dataclass(frozen=True)
class LayerTimes:
    """Nanoseconds of the operators of some networks.

    Attributes:
        networks: for each network, (weight or module, nanoseconds) of each of its operators, in order: a layer that
            is called several times has several.
        left_out: number of operators that cannot be run alone.
    """

    networks: Sequence[Sequence[tuple[str, int]]]
    left_out: int = 0


def layer_times(graphs: Sequence[ChannelGraph], settings: BackendSettings, seconds: float) -> LayerTimes:
    """Time each operator of networks alone, all in turns, so that a disturbance affects all networks alike.

    Operators that are equal are timed once. Each is run 9 times, after a run that is not timed; its time is that of
    :func:`~lightning_prune.latency.timing.undisturbed_time`.

    Args:
        graphs: of the networks, in eval mode.
        settings: where to run the operators; they are run eagerly.
        seconds: time after which no further turn begins.

    Raises:
        NotMeasured: not even the first turn can be finished in time, or no operator can be run.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> settings = BackendSettings("eager", torch.device("cpu"), threads=1)
        >>> times = layer_times([trace(net, torch.zeros(1, 3, 16, 16))], settings, seconds=60)
        >>> [name for name, nanoseconds in times.networks[0]]
        ['0.weight', '1']
    """
    pieces = [operators(graph) for graph in graphs]
    points = {
        (piece.signature, piece.dense_counts): TimedPiece(piece, piece.dense_counts)
        for network in pieces
        for piece in network
    }
    _measure(list(points.values()), settings, seconds)
    failed = {key for key, point in points.items() if point.error}
    if len(failed) == len(points):
        raise NotMeasured("none of its operators can be run alone")
    keys = [[(piece.layer, (piece.signature, piece.dense_counts)) for piece in network] for network in pieces]
    nanoseconds = {
        key: round(undisturbed_time(point.times)) for key, point in points.items() if key not in failed
    }
    networks = [
        [(layer, nanoseconds[key]) for layer, key in network if key in nanoseconds] for network in keys
    ]
    return LayerTimes(networks, sum(key in failed for network in keys for _, key in network))


def _measure(points: Sequence[TimedPiece], settings: BackendSettings, seconds: float) -> None:
    """Time all points in each turn; the first turn must be finished in time."""
    clock, start = clock_for(settings.device, settings.threads), time.monotonic()
    with settings.active():
        for number, index in enumerate(turn_order(len(points), TURNS)):
            if time.monotonic() - start > seconds:
                if number < len(points):
                    raise NotMeasured(f"it takes more than {seconds:.0f} s")
                return
            points[index].measure(settings, clock)
