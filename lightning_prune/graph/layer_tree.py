"""The layers of a network and the modules that contain them, by qualified name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["LayerTree", "module_of"]


def module_of(weight: str) -> str:
    """Return the name of the module that owns a parameter.

    Example:
        >>> module_of("encoder.conv1.weight")
        'encoder.conv1'
    """
    return weight.rpartition(".")[0] or weight


def _containers_above(name: str) -> list[str]:
    """Return the modules that contain ``name``, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


@dataclass(frozen=True)
class LayerTree:
    """Layers and the blocks that contain them.

    Attributes:
        layers: the modules that own a weight with filters.
        blocks: each module that contains several of these weights -> the weights.

    Example:
        >>> tree = LayerTree.of(["a.conv1.weight", "a.conv2.weight", "b.conv.weight"])
        >>> tree.blocks
        {'a': ['a.conv1.weight', 'a.conv2.weight']}
        >>> tree.owners("a.conv1.bias"), tree.owners("a.norm.weight")
        (['a.conv1', 'a'], ['a'])
    """

    layers: frozenset[str]
    blocks: dict[str, list[str]]

    @classmethod
    def of(cls, weights: Iterable[str]) -> LayerTree:
        """Return the tree of a network with these weights."""
        layers: set[str] = set()
        weights_of: dict[str, list[str]] = {}
        for weight in weights:
            layers.add(module_of(weight))
            for container in _containers_above(module_of(weight)):
                weights_of.setdefault(container, []).append(weight)
        blocks = {name: inside for name, inside in weights_of.items() if len(inside) > 1}
        return cls(frozenset(layers), blocks)

    def owners(self, name: str) -> list[str]:
        """Return the layer (if any) and the blocks, the outermost first, that a parameter or module belongs to."""
        layer = [module for module in (name, module_of(name)) if module in self.layers][:1]
        containers = [*_containers_above(name), name]
        return layer + [module for module in containers if module in self.blocks and module not in layer]
