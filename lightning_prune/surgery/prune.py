"""Remove units from a network physically; the cut is proven right, or rolled back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.graph.block_search import blocks_of
from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace
from lightning_prune.graph.trace import trace
from lightning_prune.graph.unit_map import UnitMap
from lightning_prune.serialization.cut_notes import CutState, note_cut
from lightning_prune.serialization.integrity import fingerprint
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.module_sizes import size_paths, update_sizes_
from lightning_prune.surgery.optimizer_state import CutParameter, check_buffers, cut_state_
from lightning_prune.surgery.proof import ProofError, concerned_units, prove
from lightning_prune.surgery.rollback import snapshot
from lightning_prune.surgery.vanish import vanish_modules_of_blocks_
from lightning_prune.surgery.vanish_proof import VanishingError
from lightning_prune.tracing.ids import Units
from lightning_prune.tracing.isolation import gc_paused
from lightning_prune.tracing.traced_int import Attribute, TensorSize, evaluate, leaves, set_attribute, solve
from lightning_prune.tracing.tracker import SizeUse
from lightning_prune.utils.devices import on_cpu
from lightning_prune.utils.module_walk import named_modules, walked_once
from lightning_prune.utils.modules import (
    cut,
    drop_caches_,
    freeze_empty_,
    named_tensors,
    same_values,
    set_data,
)
from lightning_prune.utils.named_sizes import named_path, read_size
from lightning_prune.utils.passing import PassingFailure, is_passing

__all__ = ["SurgeryError", "prune_", "surviving_indices"]


class SurgeryError(RuntimeError):
    """A cut was refused, or failed its proof. Model and optimizers are unchanged.

    Attributes:
        units: the units that the operator at fault reads; pin them and select again.
        blocks: the residual blocks that cannot vanish.

    Example:
        >>> SurgeryError("two layers disagree", units=np.array([3, 4])).units.tolist()
        [3, 4]
    """

    def __init__(self, message: str, units: Units | None = None, blocks: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.units = np.empty(0, np.int64) if units is None else units
        self.blocks = tuple(blocks)


@on_cpu()
def prune_(
    model: nn.Module,
    graph: ChannelGraph,
    remove: Iterable[int] = (),
    optimizers: Sequence[Optimizer] = (),
    blocks: Sequence[str] | None = None,
) -> PruningRecord:
    """Remove units from ``model`` in place: from parameters, buffers, size attributes and optimizer state.

    ``Parameter`` objects stay the same and get smaller data; their gradients become None. The smaller network is
    traced again and compared with ``graph``, unless ``graph`` shows already that the cut is right, because the
    network's code reads no size that the cut changes. If this proof fails, the cut is rolled back. ``graph``
    describes the model before the cut: trace again before the next one.

    Args:
        model: the network that ``graph`` was traced from.
        graph: its units and their dependencies.
        remove: numbers of units, all in ``graph.prunable``, or a :class:`~lightning_prune.selection.plan.Plan`.
        optimizers: their state is cut too, so that training continues with the momentum of what remains; so are the
            states of optimizers that they wrap, and tensors in their attributes that belong to parameters.
        blocks: names of residual blocks that vanish, see :func:`~lightning_prune.residual_blocks`; None: those of the
            plan, if ``remove`` is one. What follows a block then reads its input. Parameters that vanish are removed
            from the groups of the optimizers. Units that only these blocks have need not be named.

    Returns:
        The record of what survives, relative to the model before this call.

    Raises:
        SurgeryError: a unit must not be removed, a layer would become empty, or the proof failed.
        ValueError: an optimizer keeps tensors outside of its state that cannot be cut; a block is unknown, or cannot
            vanish.
        PassingFailure: the proof could not be made for now, for example for lack of memory. Model and optimizers are
            unchanged, and the same call may succeed later.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> graph = trace(net, torch.zeros(1, 3, 16, 16))
        >>> record = prune_(net, graph, remove=graph.layers["0.weight"][:5])
        >>> net[0], record.kept["3.weight"]
        (Conv2d(3, 3, kernel_size=(3, 3), stride=(1, 1)), {1: [5, 6, 7]})
    """
    names = list(getattr(remove, "blocks", ()) if blocks is None else blocks)
    units = np.unique(np.asarray(list(remove), dtype=np.int64))
    if names:
        return _prune_with_blocks_(model, graph, units, optimizers, names)
    with walked_once(model):
        return _prune_(model, graph, units, optimizers)


def _prune_with_blocks_(
    model: nn.Module,
    graph: ChannelGraph,
    remove: Units,
    optimizers: Sequence[Optimizer],
    blocks: Sequence[str],
) -> PruningRecord:
    """Let blocks vanish, trace what is left, and remove the units from it; all or nothing."""
    evidence = _check(model, graph, np.empty(0, np.int64))
    blocks_of(graph).check(blocks)
    for optimizer in optimizers:
        check_buffers(optimizer)
    restore = snapshot(model, [*named_tensors(model)], optimizers)
    with _rolled_back(restore, graph, remove):
        try:
            record = vanish_modules_of_blocks_(model, graph, blocks, optimizers)
        except VanishingError as error:
            raise SurgeryError(f"{error}; the cut was rolled back", blocks=error.blocks) from error
        drop_caches_(model)
        if not len(remove):
            return record
        (args, kwargs), *others = evidence.examples
        smaller = trace(model, *args, others=others, **kwargs)
        units = UnitMap.of(graph, smaller)
        try:
            with walked_once(model):
                return record.then(_prune_(model, smaller, units.forward(remove), optimizers))
        except SurgeryError as error:
            raise SurgeryError(str(error), units.backward(error.units)) from error


def _prune_(
    model: nn.Module, graph: ChannelGraph, remove: Units, optimizers: Sequence[Optimizer]
) -> PruningRecord:
    evidence = _check(model, graph, remove)
    for optimizer in optimizers:
        check_buffers(optimizer)
    kept = graph.kept(remove)
    indices = surviving_indices(graph, kept)
    settings = _settings(evidence, graph, kept)
    tensors = named_tensors(model)
    before = {name: tensors[name].data for name in indices}
    shapes, dense = {name: list(data.shape) for name, data in before.items()}, fingerprint(model)
    paths = _attribute_paths(model, settings)
    state = CutState.of(model, indices, [*paths, *size_paths(model, indices)])
    with gc_paused(), _rolled_back(snapshot(model, indices, optimizers), graph, remove):
        _cut_(tensors, indices, optimizers)
        for attribute, value in settings:
            set_attribute(attribute, value)
        updated_sizes = update_sizes_(model, indices)
        _check_values(tensors, before, graph, kept)
        prove(graph, kept, indices, _changes(model, paths, updated_sizes))
        drop_caches_(model)
    freeze_empty_(tensors.values())
    record = PruningRecord(indices, shapes, _new_attributes(paths, updated_sizes), dense=dense)
    note_cut(model, record.kept, record.shapes, record.attributes, state)
    return record


def _check(model: nn.Module, graph: ChannelGraph, remove: Units) -> DenseTrace:
    """Raise if the cut can be refused before anything is changed."""
    if graph.evidence is None or graph.evidence.tracker.model is not model:
        raise SurgeryError("the graph was traced from another model; trace this one")
    refused = remove[~np.isin(remove, graph.prunable)]
    if len(refused):
        reason = graph.pinned.get(int(refused[0]), "no such unit")
        raise SurgeryError(f"unit {refused[0]} must stay: {reason}", refused)
    kept = graph.kept(remove)
    _check_multiples(graph, kept)
    tensors = named_tensors(model)
    for name, dims in graph.bindings.items():
        if tensors[name].is_meta:
            raise SurgeryError(f"{name!r} is on the meta device: load the network's values before cutting it")
        for dim, units in dims.items():
            if tensors[name].shape[dim] != len(units):
                raise SurgeryError(f"{name!r} has changed its shape since the trace; trace the model again")
            if not np.count_nonzero(kept[units]) and not graph.may_empty(units):
                raise SurgeryError(f"nothing would be left of {name!r}, dimension {dim}", np.unique(units))
    return graph.evidence


def _check_multiples(graph: ChannelGraph, kept: NDArray[np.bool_]) -> None:
    for each in graph.multiples:
        remaining = int(np.append(kept, True)[each.units].sum())  # indices without a unit (-1) remain
        if remaining % each.number:
            raise SurgeryError(
                f"{remaining} channels would remain at {each.where}, which needs a multiple of {each.number}",
                np.unique(each.units[each.units >= 0]),
            )


def surviving_indices(graph: ChannelGraph, kept: NDArray[np.bool_]) -> dict[str, dict[int, list[int]]]:
    """Return the surviving indices of every dimension that loses some: tensor -> dimension -> indices."""
    indices: dict[str, dict[int, list[int]]] = {}
    for name, dims in graph.bindings.items():
        for dim, units in dims.items():
            left = np.flatnonzero(kept[units])
            if len(left) < len(units):
                indices.setdefault(name, {})[dim] = left.tolist()
    return indices


def _settings(
    evidence: DenseTrace, graph: ChannelGraph, kept: NDArray[np.bool_]
) -> list[tuple[Attribute, int]]:
    """Return the attributes that determine sizes in the forward, each with its value after the cut."""
    tracker, survives = evidence.tracker, np.append(kept, True)[evidence.unit_of]

    def size_after(default: int, *arrays: Tensor | None) -> int:
        masks = [survives[evidence.components[ids.numpy()]] for ids in arrays if ids is not None]
        return int(np.logical_and.reduce(masks).sum()) if masks else default

    values: dict[Any, int] = {}
    attributes: dict[Any, Attribute] = {}
    for use in sorted(tracker.size_uses, key=lambda use: len(list(leaves(use.size)))):
        for leaf in leaves(use.size):
            if isinstance(leaf, TensorSize):
                values[leaf.key] = size_after(leaf.value, tracker.sizes.get(leaf.key))
            else:
                attributes.setdefault(leaf.key, leaf)
        values = _solve_use(evidence, graph, use, size_after(len(use.ids), use.ids, *use.others), values)
    return [
        (leaf, values[key]) for key, leaf in attributes.items() if key in values and values[key] != leaf.value
    ]


def _solve_use(
    evidence: DenseTrace, graph: ChannelGraph, use: SizeUse, size: int, values: dict[Any, int]
) -> dict[Any, int]:
    """Return ``values`` extended by values of attributes with which the size that is used becomes ``size``."""
    if not size and len(use.ids) and not graph.may_empty(_units_of_use(evidence, use)):
        raise SurgeryError(f"nothing would be left at {use.where}", _units_of_use(evidence, use))
    solved = solve(use.size, size, values)
    # An attribute that an earlier use has fixed must keep its value.
    if solved is None or evaluate(use.size, solved) != size or not values.items() <= solved.items():
        raise SurgeryError(
            f"no value of an attribute gives the size {size} at {use.where}", _units_of_related(evidence, use)
        )
    return solved


def _units_of_related(evidence: DenseTrace, use: SizeUse) -> Units:
    """Return the units of all dimensions whose sizes depend on an attribute that this one depends on."""
    keys = {leaf.key for leaf in leaves(use.size)}
    uses = [
        other for other in evidence.tracker.size_uses if any(leaf.key in keys for leaf in leaves(other.size))
    ]
    return np.unique(np.concatenate([_units_of_use(evidence, other) for other in uses]))


def _units_of_use(evidence: DenseTrace, use: SizeUse) -> Units:
    units = np.unique(evidence.unit_of[evidence.components[use.ids.numpy()]])
    return units[units >= 0]


def _cut_(
    tensors: Mapping[str, Tensor],
    indices: Mapping[str, Mapping[int, list[int]]],
    optimizers: Sequence[Optimizer],
) -> None:
    cut_parameters = {
        name: CutParameter(tensors[name], tensors[name].shape, dims) for name, dims in indices.items()
    }
    for name, dims in indices.items():
        set_data(tensors[name], cut(tensors[name], dims))
    for optimizer in optimizers:
        cut_state_(optimizer, cut_parameters)


def _check_values(
    tensors: Mapping[str, Tensor], before: Mapping[str, Tensor], graph: ChannelGraph, kept: NDArray[np.bool_]
) -> None:
    """Raise unless the remaining values are those that the graph keeps, selected by masks instead of by indices.

    Only one line of each tensor along each dimension is compared: all values would take as long as the cut.
    """
    for name, data in before.items():
        places = {dim: np.flatnonzero(kept[units]) for dim, units in graph.bindings[name].items()}
        if not _has_lines_at(places, data, tensors[name].data):
            raise ProofError(f"{name!r} was cut at the wrong indices", np.empty(0, np.int64))


def _has_lines_at(places: Mapping[int, Units], before: Tensor, after: Tensor) -> bool:
    """Whether the first line along each dimension in ``places`` has the values that were at these places."""
    shape = [len(places[dim]) if dim in places else size for dim, size in enumerate(before.shape)]
    if list(after.shape) != shape or not after.numel():
        return list(after.shape) == shape
    corner = [int(places[dim][0]) if dim in places else 0 for dim in range(before.dim())]
    lines = ((_line(before, dim, corner), _line(after, dim), left) for dim, left in places.items())
    return all(
        same_values(dense.index_select(0, torch.from_numpy(left).to(dense.device)), new)
        for dense, new, left in lines
    )


def _line(data: Tensor, dim: int, through: Sequence[int] = ()) -> Tensor:
    """Return the values along a dimension, at the position ``through`` in the others (default: 0)."""
    if data.dim() == 1:
        return data
    return data[tuple(slice(None) if d == dim else through[d] if through else 0 for d in range(data.dim()))]


@contextlib.contextmanager
def _rolled_back(restore: Callable[[], None], graph: ChannelGraph, remove: Units) -> Iterator[None]:
    """Call ``restore`` if the block raises; an error always names units that were to be removed."""
    try:
        yield
    except BaseException as error:
        restore()
        if isinstance(error, Exception) and is_passing(error):
            raise PassingFailure(f"{error}; the cut was rolled back, and may succeed later") from error
        if isinstance(error, ProofError):
            units = concerned_units(graph, error, remove)
            raise SurgeryError(f"{error}; the cut was rolled back", units) from error
        raise


def _attribute_paths(
    model: nn.Module, settings: Sequence[tuple[Attribute, int]]
) -> dict[str, tuple[nn.Module, str]]:
    """Return the path of every attribute that will be set -> its module, and its name there."""
    names = {id(module): name for name, module in named_modules(model)}
    paths = {}
    for attribute, _ in settings:
        item = attribute.item
        name = named_path(attribute.name, item) if isinstance(item, str) else attribute.name
        paths[f"{names[id(attribute.owner)]}.{name}".lstrip(".")] = (attribute.owner, name)
    return paths


def _changes(
    model: nn.Module, paths: Mapping[str, tuple[nn.Module, str]], updated_sizes: Mapping[str, Any]
) -> dict[tuple[int, str], Any]:
    """Return the attributes that surgery has set, by the id of their module and their name, with their values."""
    modules = dict(named_modules(model))
    split = [(*path.rpartition(".")[::2], size) for path, size in updated_sizes.items()]
    updated = {(id(modules[owner]), name): size for owner, name, size in split}
    return {(id(owner), name): read_size(owner, name) for owner, name in paths.values()} | updated


def _new_attributes(
    paths: Mapping[str, tuple[nn.Module, str]], updated_sizes: Mapping[str, Any]
) -> dict[str, int | list[int]]:
    """Return every attribute that was set, by its path, with its present value."""
    values = {path: read_size(owner, name) for path, (owner, name) in paths.items()}
    values.update(updated_sizes)
    return {path: size if isinstance(size, int) else list(size) for path, size in values.items()}
