"""Whether a latency table was made for the layers of a network, which may have been pruned since."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_costs import dense_trace_of
from lightning_prune.latency.backends import Piece
from lightning_prune.latency.store import REBUILD, LatencyError, Measurements
from lightning_prune.serialization.integrity import INSIST, Fingerprint, difference, fingerprint

__all__ = ["check_network", "dense_layers"]


def dense_layers(pieces: Sequence[Piece], graph: ChannelGraph) -> Fingerprint:
    """Return dtype and shape of the tensors of all layers with pieces, by names within the module that holds all."""
    names = fingerprint(dense_trace_of(graph).tracker.model)
    named = {piece.layer for piece in pieces}  # modules, or their weights
    layers = {name.rpartition(".")[0] if name in names else name for name in named}
    own = {name: form for name, form in names.items() if name.rpartition(".")[0] in layers}
    prefix = _common_module(own)
    return {name.removeprefix(prefix): form for name, form in own.items()}


def check_network(measured: Measurements, here: Fingerprint) -> None:
    """Raise LatencyError if the table was made for a network with other layers.

    Args:
        measured: the table; one from before there were fingerprints fits every network.
        here: result of :func:`dense_layers` for this network.
    """
    if not measured.dense:
        return
    smaller = {
        name
        for name, form in here.items()
        if name in measured.dense and _can_remain(form, measured.dense[name])
    }
    # Layers may have vanished from a pruned network.
    saved = {name: form for name, form in measured.dense.items() if name in here or not smaller}
    differences = difference(saved, {**here, **{name: measured.dense[name] for name in smaller}})
    if differences:
        raise LatencyError(f"the latency table is of another network: {differences}; {REBUILD}. Or {INSIST}")


def _common_module(names: Iterable[str]) -> str:
    """Return the name of the innermost module that holds all tensors, with a dot at its end; "" for the whole.

    Example:
        >>> _common_module(["net.conv.weight", "net.norm.weight"]), _common_module(["conv.weight", "norm.weight"])
        ('net.', '')
    """
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while parts and all(shared < len(part) and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared]) if parts else ""


def _can_remain(here: Sequence[Any], saved: Sequence[Any]) -> bool:
    """Return whether a tensor can be what a cut left of a saved one: of its dtype, and smaller in some dimension."""
    (dtype, shape), (saved_dtype, saved_shape) = here, saved
    fits = dtype == saved_dtype and len(shape) == len(saved_shape) and shape != saved_shape
    return fits and all(size <= dense for size, dense in zip(shape, saved_shape, strict=True))
