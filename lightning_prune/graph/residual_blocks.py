"""The residual blocks of a network, as found by :func:`~lightning_prune.graph.block_search.residual_blocks`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import groupby
from typing import Any

from torch import nn

from lightning_prune.graph.branch_modules import replacements_of
from lightning_prune.graph.dataflow import Flow
from lightning_prune.graph.skipped_owners import skipped_owners
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.modules import is_within

__all__ = ["Place", "ResidualBlock", "ResidualBlocks"]

#: module whose forward adds, number among the additions of that module: the same in every forward
Place = tuple[str, int]


@dataclass(frozen=True)
class ResidualBlock:
    """A branch that is added to its own input, and can vanish.

    Attributes:
        name: of the block: the module that adds, if it adds once, else the largest module of the branch.
        owner: name of the module whose forward adds.
        modules: modules that belong only to the branch, none within another.
        place: where the addition is: its module, and its number among that module's additions.
        frozen: parameters that only the branch reads, but by the code around its modules: they stay, untrained,
            unless the whole of that module vanishes.
        tensors: parameters and buffers of ``modules``.

    Example:
        >>> import torch
        >>> from lightning_prune import residual_blocks
        >>> from lightning_prune.classification.networks.cifar_resnet import CifarResNet
        >>> blocks = residual_blocks(CifarResNet(depth=8, width=4), torch.zeros(1, 1, 16, 16))
        >>> blocks.blocks["blocks.0"].modules
        ('blocks.0.bn1', 'blocks.0.bn2', 'blocks.0.conv1', 'blocks.0.conv2')
    """

    name: str
    owner: str
    modules: tuple[str, ...]
    place: Place
    frozen: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


@dataclass
class ResidualBlocks:
    """The residual blocks of a network: those that may vanish, and why the others may not.

    Attributes:
        model: the network.
        flows: its recorded forwards.
        examples: inputs of these.
        blocks: name -> block, in the order of the forward.
        fixed: name of a block -> why it cannot vanish.
        places: of each forward, place -> the operator that adds, for blocks that may vanish.
        gone: of each forward, additions of branches that have vanished already.

    Iterating over it gives the names of the blocks that may vanish.

    Example:
        >>> import torch
        >>> from lightning_prune import residual_blocks
        >>> from lightning_prune.classification.networks.cifar_resnet import CifarResNet
        >>> blocks = residual_blocks(CifarResNet(depth=14, width=4), torch.zeros(1, 1, 16, 16))
        >>> blocks.stages()  # of one shape each
        [['blocks.0', 'blocks.1'], ['blocks.3'], ['blocks.5']]
    """

    model: nn.Module
    flows: list[Flow]
    examples: tuple[Example, ...] = ()
    blocks: dict[str, ResidualBlock] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    places: list[dict[Place, tuple[int, int]]] = field(default_factory=list)
    gone: list[dict[int, int]] = field(default_factory=list)

    def severed(self, names: Iterable[str]) -> list[dict[int, int]]:
        """Return, for each forward, the additions of some blocks and of those that are gone -> operand that stays."""
        return self.severed_at([self.blocks[name].place for name in names])

    def severed_at(self, places: Sequence[Place]) -> list[dict[int, int]]:
        """Do as :meth:`severed` for additions by their place, also those that are no blocks yet."""
        return [
            gone | {found[place][0]: found[place][1] for place in places if place in found}
            for found, gone in zip(self.places, self.gone, strict=True)
        ]

    def replacements(self, names: Sequence[str], whole: bool = True) -> dict[str, dict[str, Any]]:
        """Return what takes the place of which module when some blocks vanish.

        Args:
            names: of the blocks.
            whole: whether a module of which nothing but the shortcut is left is replaced as a whole.

        Returns:
            Name of a module -> description, see :func:`~lightning_prune.utils.stand_ins.replacement`.
        """
        chosen = [self.blocks[name] for name in names]
        found: dict[str, dict[str, Any]] = {}
        if whole:
            found = skipped_owners(self.model, self.flows, self.severed(names), {b.owner for b in chosen})
        for owner, what in found.items():
            what["blocks"] = [block.name for block in chosen if is_within(block.owner, owner)]
        for block in chosen:
            if not any(is_within(block.owner, owner) for owner in found):
                adds = [places.get(block.place) for places in self.places]
                parts = replacements_of(self.flows, adds, block.modules)
                next(what for what in parts.values() if what["as"] == "zero")["blocks"] = [block.name]
                found |= parts
        skipped = [name for name, what in found.items() if what["as"] == "skipped"]
        return {  # what lies within a module that goes as a whole goes with it
            name: what
            for name, what in found.items()
            if not any(name != other and is_within(name, other) for other in skipped)
        }

    def stages(self) -> list[list[str]]:
        """Return the blocks that may vanish, in runs with sums of one shape."""
        runs = groupby(self.blocks, key=self._shape_of)
        return [list(names) for _, names in runs]

    def _shape_of(self, name: str) -> tuple[int, ...]:
        place = self.blocks[name].place
        for flow, places in zip(self.flows, self.places, strict=True):
            if place in places:
                return tuple(flow.steps[places[place][0]].call.outputs[0].shape)
        return ()

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError unless all of these are blocks that may vanish; say why, or what was meant."""
        for name in names:
            if name in self.fixed:
                raise ValueError(f"the block {name!r} cannot vanish: {self.fixed[name]}")
            if name not in self.blocks:
                near = get_close_matches(name, self.blocks, n=3, cutoff=0.3) or list(self.blocks)[:3]
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "there are none"
                raise ValueError(f"no residual block {name!r}: {hint}")

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)
