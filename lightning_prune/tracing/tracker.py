"""What is known while the recorded operators are followed: labels, ties, sizes, costs (level 1).

A tensor's *labels* give, for each of its dimensions, the id arrays that run along it: none for a batch or a
pixel, one for channels, rarely two where two labelled dimensions were merged. An index survives when its id
survives in each of the arrays.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids, Ties
from lightning_prune.tracing.traced_int import TensorSize, TracedInt, leaves

__all__ = ["Cost", "Labels", "Sized", "TensorOrigin", "TracedOperator", "Tracker", "Use"]

Labels = tuple[tuple[Ids, ...], ...]


@dataclass(frozen=True)
class TensorOrigin:
    """The ids of one dimension of a parameter or buffer."""

    name: str
    dim: int
    ids: Ids


@dataclass(frozen=True)
class Use:
    """A Python-level size that must equal the number of ``ids`` that stay."""

    size: TracedInt
    ids: Ids
    where: str


@dataclass(frozen=True)
class Sized:
    """A reshape to sizes that were read from other tensors, and the labels of its result."""

    passed: tuple[int | None, ...]
    shape: torch.Size
    labels: Labels
    where: str


@dataclass(frozen=True)
class Cost:
    """MACs of one contraction: ``scale * prod(kept in factor)``."""

    layer: str
    scale: int
    factors: tuple[Ids, ...]


@dataclass(frozen=True)
class TracedOperator:
    """An operator that was followed: the labels of its tensor arguments, then those of its results."""

    call: OperatorCall
    labels: list[Labels]
    shapes: list[torch.Size]  # of the arguments, which a cut changes
    mixed: bool  # takes statistics across channels


@dataclass
class Tracker:
    """State of one analysis. Rules read and write it through its methods.

    Args:
        model: the network whose parameters and buffers carry the ids.
        initial: id arrays to start from, parameter or buffer name -> dimension -> ids; fresh ones if None.
        dense: the tracker of the network before the cut, when the smaller one is followed.
    """

    model: nn.Module
    initial: dict[str, dict[int, Ids]] | None = None
    dense: Tracker | None = None
    ties: Ties = field(default_factory=Ties)
    uses: list[Use] = field(default_factory=list)
    reshapes: list[Sized] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    filters: dict[str, int] = field(default_factory=dict)
    unsupported: dict[str, list[str]] = field(default_factory=dict)
    followed: list[TracedOperator] = field(default_factory=list)
    counted: int = 0  # how many of these, from the first, belong to the mode whose costs count
    outputs: list[torch.Size] = field(default_factory=list)
    call: OperatorCall | None = None

    def __post_init__(self) -> None:
        self.sources: dict[str, dict[int, Ids]] = {}
        self.sizes: dict[object, Ids | None] = {}
        self._decisions: defaultdict[tuple[str, ...], list[Any]] = defaultdict(list)
        self.buffers = {name for name, _ in self.model.named_buffers()}
        self._labels: dict[int, Labels] = {}
        self._alive: list[Tensor] = []
        self._storages: dict[int, str] = {}
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        for name, tensor in named:
            self._introduce(name, tensor)
        self._index_sources()

    def _introduce(self, name: str, tensor: Tensor) -> None:
        known = (self.initial or {}).get(name, {})
        ids = {d: known[d] if d in known else self.ties.fresh(n) for d, n in enumerate(tensor.shape)}
        self.sources[name] = ids
        self.label(tensor, tuple((ids[dim],) for dim in range(tensor.dim())))
        if tensor.numel() and tensor.layout is torch.strided and not tensor.is_meta:
            self._storages[tensor.untyped_storage().data_ptr()] = name

    def _index_sources(self) -> None:
        flat = [
            TensorOrigin(n, d, ids) for n, dims in self.sources.items() for d, ids in dims.items() if len(ids)
        ]
        self._ordered = sorted(flat, key=lambda source: int(source.ids[0]))
        self._starts = [int(source.ids[0]) for source in self._ordered]

    @property
    def where(self) -> str:
        """The operator and module that is being followed, for messages."""
        return str(self.call) if self.call is not None else ""

    # -- labels ---------------------------------------------------------------------------------------------

    def labels(self, tensor: Tensor) -> Labels:
        """Id arrays along each dimension of ``tensor``."""
        found = self._labels.get(id(tensor))
        if found is None or len(found) != tensor.dim():
            found = self._alias(tensor) or ((),) * tensor.dim()
        return found

    def _alias(self, tensor: Tensor) -> Labels | None:
        """Labels of ``p.data`` and the like: another tensor object over a parameter's memory."""
        real = type(tensor) in (Tensor, nn.Parameter) and tensor.numel() and not tensor.is_meta
        name = self._storages.get(tensor.untyped_storage().data_ptr()) if real else None
        dims = self.sources[name] if name is not None else {}
        same = name is not None and tuple(len(dims[d]) for d in range(len(dims))) == tuple(tensor.shape)
        return tuple((dims[dim],) for dim in range(tensor.dim())) if same else None

    def label(self, tensor: Tensor, labels: Sequence[Iterable[Ids]]) -> None:
        """Say which ids run along the dimensions of ``tensor``. Ids that do not fit it are pinned and dropped."""
        fitting: list[tuple[Ids, ...]] = [() for _ in tensor.shape]
        for dim, arrays in enumerate(labels):
            for ids in arrays:
                if dim < len(fitting) and len(ids) == tensor.shape[dim]:
                    fitting[dim] += (ids,)
                else:
                    self.pin(ids, "is lost in an operator whose rule does not fit its result")
        self._labels[id(tensor)] = tuple(fitting)
        self._alive.append(tensor)

    def along(self, tensor: Tensor, dim: int) -> Ids | None:
        """The ids along one dimension, None if it has none. Where there are two arrays, the second is pinned."""
        if tensor.dim() == 0:
            return None
        arrays = self.labels(tensor)[dim]
        for extra in arrays[1:]:
            self.pin(extra, "two prunable dimensions were merged into one")
        return arrays[0] if arrays else None

    def owner(self, ids: Ids | None) -> TensorOrigin | None:
        """The parameter's dimension that these ids come from, unchanged."""
        if ids is None or not len(ids):
            return None
        source = self._ordered[bisect_right(self._starts, int(ids[0])) - 1]
        return source if torch.equal(source.ids, ids) else None

    def before(self, what: str) -> Any:
        """What :meth:`decided` was told at this place of the dense trace, when the smaller network is followed.

        A dimension of one element looks like any other: the smaller network is read as the dense one was, and
        the proof finds out whether it may be.
        """
        key = self._place(what)
        place = len(self._decisions[key])
        before = self.dense._decisions[key] if self.dense is not None else []
        return before[place] if place < len(before) else None

    def decided(self, what: str, decision: Any) -> None:
        """Remember a decision that the operator's sizes alone do not settle."""
        self._decisions[self._place(what)].append(decision)

    def _place(self, what: str) -> tuple[str, ...]:
        # The operator's name is no part of it: where a dimension has one element, a copy becomes a view.
        call = self.call
        return (what, call.module, call.line, call.python.name if call.python else "") if call else (what,)

    # -- what rules say -------------------------------------------------------------------------------------

    def pin(self, ids: Ids | None, reason: str) -> None:
        """Forbid the removal of ``ids``; None is nothing."""
        if ids is not None:
            self.ties.pin(ids, reason, self.where)

    def pin_all(self, tensors: Iterable[Tensor], reason: str) -> None:
        """Pin every id that any of the tensors carries."""
        for tensor in tensors:
            for arrays in self.labels(tensor):
                for ids in arrays:
                    self.pin(ids, reason)

    def tie(
        self, left: Ids | None, right: Ids | None, missing: str = "meets a dimension of fixed size"
    ) -> None:
        """Tie two dimensions; where only one of them is labelled, it is pinned."""
        if left is None or right is None:
            self.pin(right if left is None else left, missing)
        else:
            self.ties.tie(left, right, self.where)

    def tie_across(self, grid: Tensor) -> Ids:
        """Tie the rows of a (k, n) grid of ids to its first row, which is returned: n channels, each k times."""
        for row in grid[1:]:
            self.ties.tie(grid[0], row, self.where)
        return grid[0]

    def mixes(self, ids: Ids | None) -> None:
        """Remember ids that meet statistics taken across channels."""
        if ids is not None:
            self.ties.statistics.append(ids)

    def use(self, size: int | None, ids: Ids) -> None:
        """A size that the user's code passed must equal the number of ``ids`` that stay; a constant pins them."""
        if isinstance(size, TracedInt) and size >= 0:
            self.uses.append(Use(size, ids, self.where))
            self.remember(size)
        elif size is not None and size >= 0:
            self.pin(ids, f"its size is written as the number {int(size)} in the code")

    def remember(self, size: int | None) -> None:
        """Note which ids run along the dimensions that a traced size was read from."""
        for leaf in leaves(size) if size is not None else ():
            if isinstance(leaf, TensorSize):
                self.sizes[leaf.key] = self.along(leaf.tensor, leaf.dim)
                self._alive.append(leaf.tensor)

    def sized(self, passed: Sequence[int | None], out: Tensor) -> None:
        """Remember sizes that were read from channels: whether they follow is known when all ties are."""
        for size in passed:
            self.remember(size)
        shapes = [leaf.key for size in passed if size is not None for leaf in leaves(size)]
        if any(self.sizes.get(key) is not None for key in shapes):
            self.reshapes.append(Sized(tuple(passed), out.shape, self.labels(out), self.where))

    def enters(self, size: TracedInt) -> None:
        """The value of a size enters the arithmetic: when it shrinks, the channels that stay are scaled otherwise."""
        self.remember(size)
        for leaf in leaves(size):
            if isinstance(leaf, TensorSize):
                self.mixes(self.sizes[leaf.key])
                continue
            for use in self.uses:
                if any(other.key == leaf.key for other in leaves(use.size)):
                    self.mixes(use.ids)
            for parameter in leaf.owner.parameters(recurse=False):  # `conv.out_channels` and the like
                for ids in (
                    ids for arrays in self.labels(parameter) for ids in arrays if len(ids) == leaf.value
                ):
                    self.mixes(ids)

    def cost(self, layer: str, scale: int, *factors: Ids | None) -> None:
        """Register MACs; unlabelled factors must be part of ``scale`` already."""
        self.costs.append(Cost(layer, int(scale), tuple(ids for ids in factors if ids is not None)))

    def filter(self, ids: Ids | None) -> str:
        """Note that ``ids`` are the filters of a layer, if they are a parameter's; the parameter's name."""
        source = self.owner(ids)
        if source is None or source.name in self.buffers:
            return ""
        if self.filters.setdefault(source.name, source.dim) != source.dim:
            self.pin(ids, f"{source.name} is a weight in both directions")
        return source.name
