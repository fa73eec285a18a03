"""Surgery: physical removal of units, proven or rolled back (level 3)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.module_sizes import show_sizes_
from lightning_prune.surgery.optimizer_state import Sliced, cut_state_
from lightning_prune.surgery.proof import ProofError, prove
from lightning_prune.surgery.rollback import snapshot
from lightning_prune.tracing.ids import Units
from lightning_prune.tracing.isolation import uncollected
from lightning_prune.tracing.traced_int import Attribute, TensorSize, evaluate, leaves, solve, write
from lightning_prune.tracing.tracker import Use
from lightning_prune.utils.modules import cut, freeze_empty_, named_tensors, set_data

__all__ = ["SurgeryError", "prune_"]


class SurgeryError(RuntimeError):
    """A cut was refused, or failed its proof; model and optimizers are as they were.

    Attributes:
        units: the units that run through the offending operator; pin them and select again.
    """

    def __init__(self, message: str, units: Units | None = None) -> None:
        super().__init__(message)
        self.units = np.empty(0, np.int64) if units is None else units


def prune_(
    model: nn.Module, graph: ChannelGraph, remove: Iterable[int], optimizers: Sequence[Optimizer] = ()
) -> PruningRecord:
    """Remove units from ``model`` in place: parameters, buffers, the sizes in its attributes, optimizer state.

    ``Parameter`` objects stay the same and get smaller data; their gradients become None. The smaller network is
    traced again and held against ``graph``: the cut is proven, or it did not happen. ``graph`` describes the
    model before the cut; trace again before the next one.

    Args:
        model: the network that ``graph`` was traced from.
        graph: what depends on what.
        remove: unit numbers, all in ``graph.prunable``; a :class:`~lightning_prune.selection.select.Plan` is one, too.
        optimizers: their state is cut along, so that training goes on as if nothing had happened.

    Returns:
        What survives, relative to the model as it was before this call.

    Raises:
        SurgeryError: a unit may not be removed, a layer would be left empty, or the proof failed.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> graph = trace(net, torch.zeros(1, 3, 16, 16))
        >>> record = prune_(net, graph, remove=graph.layers["0.weight"][:5])
        >>> net[0], record.kept["3.weight"]
        (Conv2d(3, 3, kernel_size=(3, 3), stride=(1, 1)), {1: [5, 6, 7]})
    """
    remove = np.unique(np.asarray(list(remove), dtype=np.int64))
    evidence = _check(model, graph, remove)
    kept = graph.kept(remove)
    indices = _indices(graph, kept)
    settings = _settings(evidence, graph, kept)
    tensors = named_tensors(model)
    before = {name: tensors[name].data for name in indices}
    shapes = {name: list(data.shape) for name, data in before.items()}
    with uncollected(), _rolled_back(snapshot(model, indices, optimizers)):
        _cut_(tensors, indices, optimizers)
        for attribute, value in settings:
            write(attribute, value)
        shown = show_sizes_(model, indices)
        _check_values(tensors, before, graph, kept)
        prove(graph, kept, indices)
    freeze_empty_(tensors.values())
    return PruningRecord(indices, shapes, _attributes(model, settings, shown))


def _check(model: nn.Module, graph: ChannelGraph, remove: Units) -> DenseTrace:
    """Everything that can be refused before anything is touched."""
    if graph.evidence is None or graph.evidence.tracker.model is not model:
        raise SurgeryError("the graph was traced from another model; trace this one")
    stuck = remove[~np.isin(remove, graph.prunable)]
    if len(stuck):
        reason = graph.pinned.get(int(stuck[0]), "no such unit")
        raise SurgeryError(f"unit {stuck[0]} must stay: {reason}", stuck)
    kept = graph.kept(remove)
    tensors = named_tensors(model)
    for name, dims in graph.bindings.items():
        if tensors[name].is_meta:
            raise SurgeryError(f"{name!r} is on the meta device: load the network's values before cutting it")
        for dim, units in dims.items():
            if tensors[name].shape[dim] != len(units):
                raise SurgeryError(f"{name!r} has changed its shape since the trace; trace the model again")
            if not kept[units].any() and not graph.may_empty(units):
                raise SurgeryError(f"nothing would be left of {name!r}, dimension {dim}", np.unique(units))
    return graph.evidence


def _indices(graph: ChannelGraph, kept: NDArray[np.bool_]) -> dict[str, dict[int, list[int]]]:
    """Surviving indices of every dimension that loses some."""
    found: dict[str, dict[int, list[int]]] = {}
    for name, dims in graph.bindings.items():
        for dim, units in dims.items():
            stays = kept[units]
            if not stays.all():
                found.setdefault(name, {})[dim] = np.flatnonzero(stays).tolist()
    return found


def _settings(
    evidence: DenseTrace, graph: ChannelGraph, kept: NDArray[np.bool_]
) -> list[tuple[Attribute, int]]:
    """New values of the attributes that fix dimensions: every use must come out at what is kept."""
    tracker, survives = evidence.tracker, np.append(kept, True)[evidence.unit_of]

    def count(ids: Tensor | None, otherwise: int) -> int:
        return otherwise if ids is None else int(survives[evidence.components[ids.numpy()]].sum())

    values: dict[Any, int] = {}
    attributes: dict[Any, Attribute] = {}
    for use in sorted(tracker.uses, key=lambda use: len(list(leaves(use.size)))):
        for leaf in leaves(use.size):
            if isinstance(leaf, TensorSize):
                values[leaf.key] = count(tracker.sizes.get(leaf.key), leaf.value)
            else:
                attributes.setdefault(leaf.key, leaf)
        values = _solved(evidence, graph, use, count(use.ids, len(use.ids)), values)
    return [
        (leaf, values[key]) for key, leaf in attributes.items() if key in values and values[key] != leaf.value
    ]


def _solved(
    evidence: DenseTrace, graph: ChannelGraph, use: Use, wanted: int, values: dict[Any, int]
) -> dict[Any, int]:
    """``values``, and those by which ``use`` comes out at ``wanted``."""
    if not wanted and len(use.ids) and not graph.may_empty(_units(evidence, use)):
        raise SurgeryError(f"nothing would be left at {use.where}", _units(evidence, use))
    solved = solve(use.size, wanted, values)
    if solved is None or not _agrees(use, wanted, solved, values):
        raise SurgeryError(f"no value of an attribute gives {wanted} at {use.where}", _units(evidence, use))
    return solved


def _agrees(use: Use, wanted: int, solved: Mapping[Any, int], before: Mapping[Any, int]) -> bool:
    """The use comes out right, without changing what an earlier use fixed."""
    return evaluate(use.size, solved) == wanted and all(solved[key] == value for key, value in before.items())


def _units(evidence: DenseTrace, use: Use) -> Units:
    units = np.unique(evidence.unit_of[evidence.components[use.ids.numpy()]])
    return units[units >= 0]


def _cut_(
    tensors: Mapping[str, Tensor],
    indices: Mapping[str, Mapping[int, list[int]]],
    optimizers: Sequence[Optimizer],
) -> None:
    sliced = {name: Sliced(tensors[name], tensors[name].shape, dims) for name, dims in indices.items()}
    for name, dims in indices.items():
        set_data(tensors[name], cut(tensors[name], dims))
    for optimizer in optimizers:
        cut_state_(optimizer, sliced)


def _check_values(
    tensors: Mapping[str, Tensor], before: Mapping[str, Tensor], graph: ChannelGraph, kept: NDArray[np.bool_]
) -> None:
    """What is left of each tensor must be what the graph says, found by another way than the cut's.

    Along each dimension one line through the tensor is compared: the whole would cost as much as the cut.
    """
    for name, data in before.items():
        masks = {dim: kept[units] for dim, units in graph.bindings[name].items()}
        wanted = [int(masks[dim].sum()) if dim in masks else size for dim, size in enumerate(data.shape)]
        corner = [int(masks[dim].argmax()) if dim in masks else 0 for dim in range(data.dim())]
        have = tensors[name].data
        if list(have.shape) != wanted or not all(
            torch.equal(_line(data, dim, corner)[torch.from_numpy(mask).to(data.device)], _line(have, dim))
            for dim, mask in (masks.items() if have.numel() else ())
        ):
            raise ProofError(f"{name!r} was not cut where it should have been", np.empty(0, np.int64))


def _line(data: Tensor, dim: int, through: Sequence[int] = ()) -> Tensor:
    """The line along a dimension ``through`` a place, else through the first element."""
    return data[tuple(slice(None) if d == dim else through[d] if through else 0 for d in range(data.dim()))]


@contextlib.contextmanager
def _rolled_back(put_back: Callable[[], None]) -> Iterator[None]:
    """If the block raises, everything is as before."""
    try:
        yield
    except BaseException as error:
        put_back()
        if isinstance(error, ProofError):
            raise SurgeryError(f"{error}; the cut was rolled back", error.units) from error
        raise


def _attributes(
    model: nn.Module, settings: Sequence[tuple[Attribute, int]], shown: Mapping[str, Any]
) -> dict[str, int | list[int]]:
    """Every attribute that was set, by its path, as it is now."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Any] = {}
    for attribute, _ in settings:
        path = f"{names[id(attribute.owner)]}.{attribute.name}".lstrip(".")
        found[path] = getattr(attribute.owner, attribute.name)
    return {path: size if isinstance(size, int) else list(size) for path, size in {**found, **shown}.items()}
