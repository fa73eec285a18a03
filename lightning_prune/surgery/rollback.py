"""Undo a cut: restore a network, and the state of its optimizers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.serialization.cut_notes import NOTE
from lightning_prune.surgery.optimizer_buffers import base_optimizers, buffers_of
from lightning_prune.utils.module_walk import modules_of
from lightning_prune.utils.modules import named_tensors, set_data
from lightning_prune.utils.vanished import UNTRAINED

__all__ = ["snapshot"]


def snapshot(
    model: nn.Module, names: Iterable[str], optimizers: Sequence[Optimizer] = ()
) -> Callable[[], None]:
    """Return a function that undoes all changes which later cuts of the tensors ``names`` make.

    Nothing is copied: a cut gives tensors new data, and the snapshot keeps references to the old data.

    Example:
        >>> from lightning_prune import prune_, trace
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> graph = trace(net, torch.zeros(1, 1, 8, 8))
        >>> restore = snapshot(net, graph.bindings)
        >>> _ = prune_(net, graph, [0, 1])
        >>> restore()
        >>> net[0]
        Conv2d(1, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    tensors = named_tensors(model)
    contents = [
        (tensors[name], tensors[name].data, tensors[name].grad, tensors[name].requires_grad) for name in names
    ]
    modules = [(module, dict(vars(module))) for module in modules_of(model)]
    registries = [
        (registry, dict(registry))
        for _, attributes in modules
        for key in ("_modules", "_parameters", "_buffers")
        if type(registry := attributes.get(key)) in (dict, OrderedDict) and registry
    ]
    groups = [
        (group["params"], list(group["params"]))
        for optimizer in optimizers
        for each in (optimizer, *base_optimizers(optimizer))
        for group in each.param_groups
    ]
    state_restorers = [
        _state_restorer(each) for optimizer in optimizers for each in base_optimizers(optimizer)
    ]
    buffers = [(tensor, tensor.data) for each in optimizers for tensor, _ in buffers_of(each).owned]

    def restore() -> None:
        for registry, entries in registries:  # modules that have vanished, and their parameters
            registry.clear()
            registry.update(entries)
        for parameters, before in groups:
            parameters[:] = before
        for tensor, data, grad, requires_grad in contents:
            set_data(tensor, data)
            tensor.grad = grad
            tensor.requires_grad_(requires_grad)
        for module, attributes in modules:
            if NOTE not in attributes:
                vars(module).pop(NOTE, None)
            if UNTRAINED not in attributes:
                vars(module).pop(UNTRAINED, None)
            vars(module).update(attributes)
        for tensor, data in buffers:
            set_data(tensor, data)
        for restore_state in state_restorers:
            restore_state()

    return restore


def _state_restorer(optimizer: Optimizer) -> Callable[[], None]:
    """Return a function that puts back the present state of the optimizer; its tensors are not copied."""
    before = {parameter: dict(state) for parameter, state in optimizer.state.items()}

    def restore() -> None:
        optimizer.state.clear()
        optimizer.state.update(before)
        if isinstance(optimizer, LBFGS):
            optimizer._numel_cache = None  # L-BFGS counts its parameters' elements again

    return restore
