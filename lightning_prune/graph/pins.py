"""What must stay, whatever its importance, and what may go to its last channel (level 1)."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import ref

from torch import Tensor, nn

__all__ = ["optional_parts", "pin", "pinned_tensors", "unpin"]

# By identity: a module or parameter that is gone takes its pin along.
_PINS: dict[int, tuple[ref[nn.Module | Tensor], str]] = {}


def pin(target: nn.Module | Tensor, reason: str) -> None:
    """Forbid that anything of ``target`` is removed: no filter, no input channel.

    To keep only the filters of a layer, use the callback's ``exclude``.

    Args:
        target: a module (all its parameters and buffers) or one parameter.
        reason: shown by ``graph.explain`` and wherever a unit is refused.

    Raises:
        TypeError: ``target`` is neither.

    Example:
        >>> import torch
        >>> from lightning_prune import pin, trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1))
        >>> pin(net[0], "the first layer is burnt into the sensor")
        >>> graph = trace(net, torch.zeros(1, 3, 16, 16))
        >>> graph.pinned[graph.layers["0.weight"][0]], len(graph.prunable)
        ('the first layer is burnt into the sensor', 4)
    """
    if not isinstance(target, (nn.Module, Tensor)):
        raise TypeError(f"can pin a module or a parameter, not {type(target).__name__}")
    key = id(target)
    _PINS[key] = (ref(target, lambda _: _PINS.pop(key, None)), reason)


def unpin(target: nn.Module | Tensor) -> None:
    """Take a pin back; nothing happens if there is none."""
    _PINS.pop(id(target), None)


def pinned_tensors(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Parameters and buffers of ``model`` that the user pinned, with the reason."""
    for module in model.modules():
        if id(module) in _PINS:
            reason = _PINS[id(module)][1]
            yield from ((tensor, reason) for tensor in [*module.parameters(), *module.buffers()])
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in _PINS:
            yield tensor, _PINS[id(tensor)][1]


def optional_parts(model: nn.Module) -> list[list[str]]:
    """Parts of which all but one may lose their last channel: for each set of them, their qualified names.

    A module says so by an attribute or property ``optional_parts``, a sequence of submodules; its forward leaves out
    those that have no channels.

    Example:
        >>> from lightning_prune.segmentation.networks.atom_mobile import Block
        >>> optional_parts(nn.Sequential(Block(4, 4, 1, (3, 5), 8)))
        [['0.branches.0', '0.branches.1']]
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = [[names[id(part)] for part in getattr(m, "optional_parts", ())] for m in model.modules()]
    return [parts for parts in found if parts]
