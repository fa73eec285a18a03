"""Constraints set by the user: tensors that must keep all channels, and parts that may lose their last channel."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import ref

from torch import Tensor, nn

from lightning_prune.utils.module_walk import modules_of, named_modules, tensors_of
from lightning_prune.utils.modules import declared

__all__ = ["optional_parts", "pin", "pinned_tensors", "unpin"]

# Keyed by identity; the weak reference deletes a pin together with its module or parameter.
_PINS: dict[int, tuple[ref[nn.Module | Tensor], str]] = {}


def pin(target: nn.Module | Tensor, reason: str) -> None:
    """Forbid the removal of all channels of a module or parameter: filters and input channels.

    To keep the filters of a layer only, use the ``exclude`` argument of the callback. The pin applies to graphs that
    are traced afterwards.

    Args:
        target: a module (all its parameters and buffers) or one parameter.
        reason: shown by ``graph.explain`` and in error messages.

    Raises:
        TypeError: ``target`` is neither a module nor a parameter.

    Example:
        >>> import torch
        >>> from lightning_prune import pin, trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1))
        >>> pin(net[0], "the first layer is implemented in hardware")
        >>> graph = trace(net, torch.zeros(1, 3, 16, 16))
        >>> graph.pinned[graph.layers["0.weight"][0]], len(graph.prunable)
        ('the first layer is implemented in hardware', 4)
    """
    if not isinstance(target, (nn.Module, Tensor)):
        raise TypeError(f"can pin a module or a parameter, not {type(target).__name__}")
    key = id(target)
    _PINS[key] = (ref(target, lambda _: _PINS.pop(key, None)), reason)


def unpin(target: nn.Module | Tensor) -> None:
    """Undo :func:`pin`; do nothing if ``target`` is not pinned.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> pin(layer, "shared with another network")
        >>> unpin(layer)
    """
    _PINS.pop(id(target), None)


def pinned_tensors(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Yield the parameters and buffers of ``model`` that the user pinned, each with the reason."""
    for module in modules_of(model):
        if id(module) in _PINS:
            reason = _PINS[id(module)][1]
            yield from ((tensor, reason) for tensor in [*module.parameters(), *module.buffers()])
    for tensor in tensors_of(model):
        if id(tensor) in _PINS:
            yield tensor, _PINS[id(tensor)][1]


def optional_parts(model: nn.Module) -> list[list[str]]:
    """Return sets of parts of which all but one may lose their last channel and so vanish, by qualified name.

    A module declares its parts by an attribute or property ``optional_parts``, a sequence of submodules. Its forward
    must skip parts that have no channels.

    Example:
        >>> from lightning_prune.segmentation.networks.atom_mobile import Block
        >>> optional_parts(nn.Sequential(Block(4, 4, 1, (3, 5), 8)))
        [['0.branches.0', '0.branches.1']]
    """
    names = {id(module): name for name, module in named_modules(model)}
    sets = [[names[id(part)] for part in declared(m, "optional_parts") or ()] for m in modules_of(model)]
    return [parts for parts in sets if parts]
