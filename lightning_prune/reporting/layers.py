"""The layers of a run's network before and after its cuts, kept in ``layers.json``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.summary import Change, LayerSummary, NetworkSummary, summarise
from lightning_prune.graph.trace import trace
from lightning_prune.latency.layer_times import NotMeasured, layer_times
from lightning_prune.latency.profiler import BackendSettings
from lightning_prune.reporting.comparison import place_of
from lightning_prune.serialization.json_file import read_json
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.atomic import write_text
from lightning_prune.utils.devices import short_name
from lightning_prune.utils.formatting import counted

__all__ = [
    "LAYERS",
    "layers_of",
    "layers_of_widths",
    "load_layers",
    "removed_units",
    "save_layers",
    "vanished_modules",
]

LAYERS = "layers.json"
LONGEST = 10.0  # seconds for timing the layers, so that the end of a run is not delayed noticeably


def removed_units(graph: ChannelGraph, record: PruningRecord) -> list[int]:
    """Return the units of the dense network's graph that a record has removed: those of which an index is gone.

    Example:
        >>> import torch
        >>> graph = trace(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.zeros(1, 2))
        >>> removed_units(graph, PruningRecord({"0.weight": {0: [0, 2]}, "1.weight": {1: [0, 2]}}))
        [1]
    """
    gone = [np.empty(0, np.int64)]
    for name, dims in record.kept.items():
        for dim, indices in dims.items():
            if (units := graph.bindings.get(name, {}).get(dim)) is not None:
                gone.append(np.delete(units, np.asarray(indices, dtype=np.int64)))
    removed: list[int] = np.unique(np.concatenate(gone)).tolist()
    return removed


def vanished_modules(record: PruningRecord) -> list[str]:
    """Return the names of the modules that a record has removed as a whole."""
    return [name for name, what in record.vanished.items() if what.get("as") != "untrained"]


def layers_of(
    dense: nn.Module, record: PruningRecord, image: Tensor, timing: BackendSettings | None = None
) -> NetworkSummary:
    """Return each layer of a network before and after what a record has removed.

    Args:
        dense: the network as it was built, with any weights.
        record: of its cuts.
        image: an input, of the dtype of the network.
        timing: where to time the operators of both networks, for the latency of each layer; None: nowhere.

    Raises:
        TraceError: the network cannot be traced.
    """
    graph = trace(dense, image)
    layers = summarise(graph, removed_units(graph, record), vanished=vanished_modules(record))
    if timing is None:
        return layers
    pruned = trace(record.apply_(copy.deepcopy(dense), verify=False), image) if record else graph
    return _with_latency(layers, (graph, pruned), image, timing)


def _with_latency(
    layers: NetworkSummary, graphs: tuple[ChannelGraph, ChannelGraph], image: Tensor, timing: BackendSettings
) -> NetworkSummary:
    """Return the layers with their latency, or with the reason why there is none."""
    try:
        times = layer_times(graphs, timing, LONGEST)
    except NotMeasured as error:
        return replace(layers, measured=f"The latency of each layer was not measured: {error}.")
    shape, dtype = " x ".join(map(str, image.shape)), str(image.dtype).removeprefix("torch.")
    where = place_of(timing.threads, short_name(timing.device))
    how = f"Each operator alone, in PyTorch, for one input of {shape} ({dtype}) on {where}; the operators of both "
    how += "networks take turns."
    if times.left_out:
        how += f" Without {counted(times.left_out, 'operator')} that cannot be run alone."
    return replace(layers.with_costs("latency", list(graphs[0].layers), *times.networks), measured=how)


def layers_of_widths(widths: Mapping[str, tuple[int, int]]) -> NetworkSummary:
    """Return what the widths in a summary say of each layer: its channels.

    Example:
        >>> layers_of_widths({"conv": (8, 5)}).layers[0].channels
        Change(before=8, after=5)
    """
    layers = [LayerSummary(name, "", Change(*channels), {}) for name, channels in widths.items()]
    cut = any(before != after for before, after in widths.values())
    return NetworkSummary(layers, {}, {}, cut=cut)


def save_layers(layers: NetworkSummary, folder: Path) -> None:
    """Write ``layers.json`` into the folder of a run."""
    write_text(folder / LAYERS, layers.json() + "\n")


def load_layers(folder: Path) -> NetworkSummary:
    """Read ``layers.json`` in the folder of a run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = folder / LAYERS
    try:
        return NetworkSummary.from_dict(read_json(path))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}") from error
