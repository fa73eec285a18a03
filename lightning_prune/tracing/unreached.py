"""Layers that no example reaches, in a network whose code branches on values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_prune.tracing.tracker import Tracker

__all__ = ["pin_unreached"]


def pin_unreached(tracker: Tracker) -> list[str]:
    """Pin the channels that layers in branches not taken could read or write; return notes for the user.

    Where nothing is known of a layer but its parameters, it may follow or precede any tensor with a dimension of a
    size of theirs. A network that runs without values takes the same branches for all inputs of these shapes, and
    its unreached layers are left alone.
    """
    unreached = _unreached_layers(tracker) if tracker.branches_on_values else {}
    if not unreached:
        return []
    sizes = {size for module in unreached.values() for size in _sizes(module)}
    names = ", ".join(list(unreached)[:3]) + (", ..." if len(unreached) > 3 else "")
    for operator in tracker.operators:
        results = operator.labels[len(operator.shapes) :]
        for out, labels in zip(operator.call.outputs, results, strict=True):
            for size, arrays in zip(out.shape, labels, strict=True):
                for ids in arrays if size in sizes else ():
                    tracker.ties.pin(ids, f"could be read by {names} in a branch that no example takes")
    return [f"no example reaches {names}: pass one that does, trace(model, example, others=[...])"]


def _unreached_layers(tracker: Tracker) -> dict[str, nn.Module]:
    """Return the modules with parameters of their own, none of which an operator reads."""
    tensors = [tensor for operator in tracker.operators for tensor in operator.call.tensors]
    read, memory = set(map(id, tensors)), set(map(_address, tensors)) - {0}
    return {
        name: module
        for name, module in tracker.model.named_modules()
        if (own := list(module.parameters(recurse=False)))
        and not any(id(parameter) in read or _address(parameter) in memory for parameter in own)
    }


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; 0 if it has none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if plain else 0


def _sizes(module: nn.Module) -> set[int]:
    groups = getattr(module, "groups", 1)
    groups = groups if isinstance(groups, int) else 1  # any module may give the name to something else
    sizes = {size for parameter in module.parameters(recurse=False) for size in parameter.shape}
    inputs = {p.shape[1] * groups for p in module.parameters(recurse=False) if p.dim() > 1}
    return (sizes | inputs) - {1}
