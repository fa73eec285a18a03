"""Putting a network back as it was before a cut (level 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_prune.surgery.optimizer_state import snapshot as snapshot_of_state
from lightning_prune.utils.modules import named_tensors, set_data

__all__ = ["snapshot"]


def snapshot(
    model: nn.Module, names: Iterable[str], optimizers: Sequence[Optimizer] = ()
) -> Callable[[], None]:
    """A function that puts everything back that a cut of the tensors ``names`` changes.

    Nothing is copied: a cut gives tensors new data, and the old data is kept.

    Example:
        >>> from lightning_prune import prune_, trace
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> graph = trace(net, torch.zeros(1, 1, 8, 8))
        >>> put_back = snapshot(net, graph.bindings)
        >>> _ = prune_(net, graph, [0, 1])
        >>> put_back()
        >>> net[0]
        Conv2d(1, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    tensors = named_tensors(model)
    held = [(tensors[name], tensors[name].data, tensors[name].grad) for name in names]
    trained = [(tensor, tensor.requires_grad) for tensor, _, _ in held]
    modules = [(module, dict(vars(module))) for module in model.modules()]
    restores = [snapshot_of_state(optimizer) for optimizer in optimizers]

    def put_back() -> None:
        for tensor, data, grad in held:
            set_data(tensor, data)
            tensor.grad = grad
        for tensor, requires_grad in trained:
            tensor.requires_grad_(requires_grad)
        for module, attributes in modules:
            vars(module).update(attributes)
        for restore in restores:
            restore()

    return put_back
