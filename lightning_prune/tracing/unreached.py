"""Layers that no example reaches, in a network whose code branches on values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_prune.tracing.ids import Ids
from lightning_prune.tracing.trace_records import Labels
from lightning_prune.tracing.tracker import Tracker
from lightning_prune.utils.module_walk import named_modules
from lightning_prune.utils.modules import is_within

__all__ = ["pin_unreached", "readable", "unreached_layers"]


def pin_unreached(tracker: Tracker) -> list[str]:
    """Pin the channels that layers in branches not taken could read or write; return notes for the user.

    Where nothing is known of a layer but its parameters, it may follow or precede any tensor with a dimension of a
    size of theirs. A module with code of its own may read any tensor that the module around it handles. A network
    that runs without values takes the same branches for all inputs of these shapes, and its unreached layers are left
    alone.
    """
    layers = unreached_layers(tracker)
    blocks = _unreached_blocks(tracker, layers)
    names = [*blocks, *(name for name in layers if not any(is_within(name, block) for block in blocks))]
    if not names:
        return []
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    for ids in [*readable(tracker, layers.values()), *_handled_around(tracker, blocks)]:
        tracker.ties.pin(ids, f"could be read by {listed} in a branch that no example takes")
    return [f"no example reaches {listed}: pass one that does, trace(model, example, others=[...])"]


def readable(tracker: Tracker, layers: Iterable[nn.Module]) -> Iterator[Ids]:
    """Yield the ids along all dimensions that have a size of the parameters of ``layers``."""
    sizes = {size for layer in layers for size in _sizes(layer)}
    for operator in tracker.operators:
        results = operator.labels[len(operator.shapes) :]
        for out, labels in zip(operator.call.outputs, results, strict=True):
            for size, arrays in zip(out.shape, labels, strict=True):
                yield from arrays if size in sizes else ()


def unreached_layers(tracker: Tracker) -> dict[str, nn.Module]:
    """Return the modules with parameters that no operator reads, in a network that branches on values."""
    if not tracker.branches_on_values:
        return {}
    tensors = [tensor for operator in tracker.operators for tensor in operator.call.tensors]
    read, memory = set(map(id, tensors)), set(map(_address, tensors)) - {0}
    return {
        name: module
        for name, module in named_modules(tracker.model)
        if (own := list(module.parameters(recurse=False)))
        and not any(id(parameter) in read or _address(parameter) in memory for parameter in own)
    }


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; 0 if it has none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if plain else 0


def _sizes(module: nn.Module) -> set[int]:
    groups = vars(module).get("groups", 1)
    groups = groups if isinstance(groups, int) else 1  # any module may give the name to something else
    sizes = {size for parameter in module.parameters(recurse=False) for size in parameter.shape}
    inputs = {p.shape[1] * groups for p in module.parameters(recurse=False) if p.dim() > 1}
    return (sizes | inputs) - {1}


def _unreached_blocks(tracker: Tracker, layers: Collection[str]) -> list[str]:
    """Return the modules with code of their own that did not run, though other values may make them run.

    Modules of torch do what their sizes say. Modules of the network itself without parameters are losses and metrics.
    """
    if not tracker.branches_on_values:
        return []
    return [
        name
        for name, module in named_modules(tracker.model)
        if name not in tracker.entered
        and not type(module).__module__.startswith("torch.nn.")
        and all(layer in layers for layer in _layers_within(module, name))
        and (_around(name, tracker.entered) or next(module.parameters(), None) is not None)
    ]


def _layers_within(module: nn.Module, name: str) -> Iterator[str]:
    for path, part in module.named_modules(prefix=name):
        if next(part.parameters(recurse=False), None) is not None:
            yield path


def _handled_around(tracker: Tracker, blocks: Collection[str]) -> Iterator[Ids]:
    """Yield the ids of all tensors that the module around each block, the next one that ran, handles itself."""
    for around in {_around(name, tracker.entered) for name in blocks}:
        places: dict[int, set[str]] = {}
        labels: dict[int, Labels] = {}
        for operator in tracker.operators:
            place = _place(operator.call.module, around)
            tensors = [*operator.call.tensors, *operator.call.outputs]
            for tensor, dims in zip(tensors, operator.labels, strict=True):
                if not isinstance(tensor, nn.Parameter):
                    places.setdefault(id(tensor), set()).add(place)
                    labels[id(tensor)] = dims
        for key, seen in places.items():
            # Read or made there, or passed between its parts or to the outside.
            if around in seen or len(seen) > 1:
                yield from (ids for arrays in labels[key] for ids in arrays)


def _around(name: str, entered: Collection[str]) -> str:
    """Return the nearest module around ``name`` that ran; "" is the network."""
    while name:
        name = name.rpartition(".")[0]
        if name in entered:
            return name
    return ""


def _place(module: str, around: str) -> str:
    """Return which part of ``around`` a module is in: ``around`` itself, one of its children, or "outside"."""
    if not is_within(module, around):
        return "outside"
    rest = module[len(around) :].lstrip(".").split(".")[0]
    return f"{around}.{rest}" if rest else around
