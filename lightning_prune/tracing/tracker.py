"""State of a trace while the recorded operators are followed: labels of tensors, ties, sizes, costs.

The *labels* of a tensor give, for each of its dimensions, the id arrays along it: none for a batch or a pixel
dimension, one for channels, rarely two where two labelled dimensions were merged. An index of a dimension survives
if its id survives in each of the arrays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids, Ties
from lightning_prune.tracing.module_state import ModuleState
from lightning_prune.tracing.size_reads import SizeReads
from lightning_prune.tracing.tensor_ids import TensorIds, TensorOrigin
from lightning_prune.tracing.trace_records import (
    ContractionCost,
    Labels,
    RequiredMultiple,
    SizeUse,
    TracedOperator,
    TracedReshape,
)
from lightning_prune.tracing.traced_int import Attribute, PassedSize, TensorSize, TracedInt, leaves
from lightning_prune.utils.module_walk import named_buffers

__all__ = [
    "ContractionCost",
    "Labels",
    "SizeUse",
    "TensorOrigin",
    "TracedOperator",
    "TracedReshape",
    "Tracker",
]


@dataclass
class Tracker:
    """State of one trace. Rules of operators read and change it through its methods.

    Args:
        model: the network whose parameters and buffers carry the ids.
        initial: id arrays to start from, parameter or buffer name -> dimension -> ids; fresh ones if None.
        dense: the tracker of the network before the cut, when the smaller network is traced.

    Attributes:
        size_uses: sizes that must follow the number of channels.
        reshapes: reshapes that are checked when all ties are known.
        multiples: dimensions whose size must stay a multiple of a number.
        costs: MACs of contractions.
        filters: name of each weight that has filters -> their dimension.
        unsupported: name of each operator without a rule -> modules that call it.
        operators: all operators, of every mode (eval, train) that was traced.
        num_costed: number of operators, from the first, of the mode whose costs are used.
        outputs: shapes of the network's outputs.
        call: the operator that is being followed.
        sources: parameter or buffer name -> dimension -> ids.
        named_tensors: parameters and buffers by name.
        sizes: key of a tensor size -> ids along that dimension.
        buffers: names of the buffers.
        float_ids: ids whose number became a float, which can reach any operator that follows.
        met_values: whether sizes or Python numbers depend on values from here on, in the present forward.
        entered: names of the modules that ran in any forward.
        modes_alike: whether eval and train mode treat channels alike, so that only eval mode needs a trace.
        returned: tensors that leave the network, as its outputs or for numpy, of each forward.
        reads: sizes that the network's code has read, of each forward.
        state: the network's attributes when it was traced; None in the trace of a smaller network.
        branches_on_values: whether the forward ran on real values, so that other values may take other branches.
    """

    model: nn.Module
    initial: dict[str, dict[int, Ids]] | None = None
    dense: Tracker | None = None
    ties: Ties = field(default_factory=Ties)
    size_uses: list[SizeUse] = field(default_factory=list)
    reshapes: list[TracedReshape] = field(default_factory=list)
    multiples: list[RequiredMultiple] = field(default_factory=list)
    costs: list[ContractionCost] = field(default_factory=list)
    filters: dict[str, int] = field(default_factory=dict)
    unsupported: dict[str, list[str]] = field(default_factory=dict)
    operators: list[TracedOperator] = field(default_factory=list)
    num_costed: int = 0
    outputs: list[torch.Size] = field(default_factory=list)
    call: OperatorCall | None = None

    def __post_init__(self) -> None:
        self.sizes: dict[object, Ids | None] = {}
        self.float_ids: list[Ids] = []
        self.branches_on_values = self.met_values = self.modes_alike = False
        self.entered: set[str] = set()
        self.returned: list[Tensor] = []
        self.reads: list[SizeReads] = []
        self.state: ModuleState | None = None
        self._constants: set[int] = set()
        self.buffers = {name for name, _ in named_buffers(self.model)}
        self._decisions: defaultdict[tuple[str, ...], list[Any]] = defaultdict(list)
        self._labels: dict[int, Labels] = {}
        self._kept_alive: list[Tensor] = []  # after a tensor is freed, another may get its id()
        self._tensor_ids = TensorIds(self.model, self.ties, self.initial or {})
        self.sources, self.named_tensors = self._tensor_ids.by_name, self._tensor_ids.tensors
        for name, tensor in self._tensor_ids.tensors:
            dims = self.sources[name]
            if self.initial is None:
                self._labels[id(tensor)] = _labels_of(dims)
            else:  # whose ids may have been cut to another number than the tensor
                self.label(tensor, _labels_of(dims))

    @property
    def where(self) -> str:
        """The operator that is being followed and its module, for messages."""
        return self.call.description if self.call is not None else ""

    # -- labels ---------------------------------------------------------------------------------------------

    def labels(self, tensor: Tensor) -> Labels:
        """Return the id arrays along each dimension of ``tensor``."""
        labels = self._labels.get(id(tensor))
        if labels is None or len(labels) != tensor.dim():
            alias = self._tensor_ids.of_alias(tensor)
            labels = _labels_of(alias) if alias else ((),) * tensor.dim()
        return labels

    def label(self, tensor: Tensor, labels: Sequence[Iterable[Ids]]) -> None:
        """Set the id arrays along each dimension of ``tensor``; an array of a wrong length is pinned and dropped."""
        valid_labels: list[tuple[Ids, ...]] = [() for _ in tensor.shape]
        for dim, arrays in enumerate(labels):
            for ids in arrays:
                if dim < len(valid_labels) and len(ids) == tensor.shape[dim]:
                    valid_labels[dim] += (ids,)
                else:
                    self.pin(ids, "is lost in an operator whose rule does not fit its result")
        self._labels[id(tensor)] = tuple(valid_labels)
        self._kept_alive.append(tensor)

    def along(self, tensor: Tensor, dim: int) -> Ids | None:
        """Return the ids along one dimension, None if it has none. If there are two arrays, the second is pinned."""
        if tensor.dim() == 0:
            return None
        arrays = self.labels(tensor)[dim]
        for ids in arrays[1:]:
            self.pin(ids, "two prunable dimensions were merged into one")
        return arrays[0] if arrays else None

    def origin(self, ids: Ids | None) -> TensorOrigin | None:
        """Return the parameter's or buffer's dimension whose ids are exactly these; None if there is none."""
        return self._tensor_ids.origin(ids)

    # -- decisions ------------------------------------------------------------------------------------------

    def dense_decision(self, name: str) -> Any:
        """Return the decision that was recorded for this operator in the dense trace; None if there is none.

        In the smaller network a dimension of one element does not show what it is. So that network is read like the
        dense one, and the proof checks whether this is right.
        """
        if self.dense is None:
            return None
        key = self._decision_key(name)
        index, decisions = len(self._decisions[key]), self.dense._decisions[key]
        return decisions[index] if index < len(decisions) else None

    def record_decision(self, name: str, decision: Any) -> None:
        """Record a decision of a rule that the operator's sizes alone do not determine."""
        self._decisions[self._decision_key(name)].append(decision)

    def _decision_key(self, name: str) -> tuple[str, ...]:
        # Without the operator's name: where a dimension has one element, a copy becomes a view.
        return (name, *self.call.place) if self.call else (name,)

    # -- ties and pins --------------------------------------------------------------------------------------

    def pin(self, ids: Ids | None, reason: str) -> None:
        """Forbid the removal of ``ids``; do nothing for None."""
        if ids is not None:
            self.ties.pin(ids, reason, self.where)

    def pin_all(self, tensors: Iterable[Tensor], reason: str) -> None:
        """Forbid the removal of all ids along any dimension of the tensors."""
        for tensor in tensors:
            for arrays in self.labels(tensor):
                for ids in arrays:
                    self.pin(ids, reason)

    def tie(
        self, left: Ids | None, right: Ids | None, missing: str = "meets a dimension of fixed size"
    ) -> None:
        """Tie two dimensions; if only one has ids, pin it for the reason ``missing``."""
        if left is None or right is None:
            self.pin(right if left is None else left, missing)
        else:
            self.ties.tie(left, right, self.where)

    def tie_operand(self, ids: Ids | None, operand: Tensor, dim: int) -> None:
        """Tie ``ids`` to a dimension of ``operand``; where that was expanded from one element, it follows them."""
        dim %= operand.dim()
        if operand.shape[dim] > 1 and operand.stride(dim) == 0 and not self.labels(operand)[dim]:
            labels = list(self.labels(operand))
            labels[dim] = () if ids is None else (ids,)
            self.label(operand, labels)
        elif operand.shape[dim] > 1:
            self.tie(ids, self.along(operand, dim))

    def tie_across(self, grid: Tensor) -> Ids:
        """Tie all rows of a (k, n) grid of ids, k ids for each of n channels, and return the first row."""
        for row in grid[1:]:
            self.ties.tie(grid[0], row, self.where)
        return grid[0]

    def mark_statistics(self, ids: Ids | None) -> None:
        """Record ids over which an operator takes statistics, so that their removal changes other channels."""
        if ids is not None:
            self.ties.statistics.append(ids)

    # -- sizes ----------------------------------------------------------------------------------------------

    def require_size(self, size: PassedSize, ids: Ids) -> None:
        """Require that a passed size equals the number of ``ids`` that remain; pin ``ids`` if it is a constant."""
        if isinstance(size, TracedInt) and size >= 0:
            self.size_uses.append(SizeUse(size, ids, self.where))
            self.register_size(size)
        elif size is not None and size >= 0:
            self.pin(ids, f"its size is written as the number {int(size)} in the code")

    def require_multiple(self, ids: Ids | None, multiple: int) -> None:
        """Require that the number of ``ids`` that remain is a multiple of a number; do nothing for None."""
        if ids is not None and multiple > 1:
            self.multiples.append(RequiredMultiple(ids, multiple, self.where))

    def require_size_of_all(self, size: PassedSize, arrays: Sequence[Ids]) -> None:
        """Note that a size, required of each of several id arrays along one dimension, is that of all together."""
        for index, use in enumerate(self.size_uses):
            same_dimension = use.size is size and use.where == self.where
            if same_dimension and any(torch.equal(use.ids, ids) for ids in arrays):
                self.size_uses[index] = replace(use, others=tuple(arrays))

    def register_size(self, size: PassedSize) -> None:
        """Store in ``sizes`` the ids along each dimension that a traced size was read from."""
        for leaf in leaves(size) if size is not None else ():
            if isinstance(leaf, TensorSize):
                self.sizes[leaf.key] = self.along(leaf.tensor, leaf.dim)
                self._kept_alive.append(leaf.tensor)

    def register_reshape(self, passed: Sequence[PassedSize], out: Tensor) -> None:
        """Store a reshape to sizes that depend on channels, to be checked when all ties are known."""
        for size in passed:
            self.register_size(size)
        keys = [leaf.key for size in passed if size is not None for leaf in leaves(size)]
        if any(self.sizes.get(key) is not None for key in keys):
            self.reshapes.append(TracedReshape(tuple(passed), out.shape, self.labels(out), self.where))

    def mark_float_use(self, size: TracedInt) -> None:
        """Mark ids whose number is used as a number: removing some of them changes what it scales.

        In the field's networks that is the scale of attention and of correlations, and the width of a norm.
        """
        self.register_size(size)
        for leaf in leaves(size):
            if isinstance(leaf, TensorSize):
                self.mark_statistics(self.sizes[leaf.key])
            else:
                self._mark_sized_by(leaf)

    def mark_as_float(self, size: TracedInt) -> None:
        """Mark ids whose number the code made a float, as in ``c ** -0.5``: it is lost which operator gets it."""
        num_marked = len(self.ties.statistics)
        self.mark_float_use(size)
        self.float_ids += self.ties.statistics[num_marked:]

    def mark_constant(self, tensor: Tensor) -> None:
        """Note that ``tensor`` has the same value everywhere, which is not zero."""
        self._constants.add(id(tensor))
        self._kept_alive.append(tensor)

    def is_constant(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` was made with the same value everywhere, so that its sum counts channels."""
        return id(tensor) in self._constants

    def _mark_sized_by(self, attribute: Attribute) -> None:
        for use in self.size_uses:
            if any(leaf.key == attribute.key for leaf in leaves(use.size)):
                self.mark_statistics(use.ids)
        for parameter in attribute.owner.parameters(recurse=False):  # `conv.out_channels` and the like
            for arrays in self.labels(parameter):
                for ids in arrays:
                    if len(ids) == attribute.value:
                        self.mark_statistics(ids)

    # -- costs ----------------------------------------------------------------------------------------------

    def cost(self, layer: str, scale: int, *factors: Ids | None) -> None:
        """Add MACs of a layer: ``scale`` times the size of each factor; sizes without ids belong into ``scale``."""
        self.costs.append(
            ContractionCost(
                layer, int(scale), tuple(ids for ids in factors if ids is not None), self.met_values
            )
        )

    def register_filters(self, ids: Ids | None) -> str:
        """Register ``ids`` as the filters of a layer if they are a dimension of a parameter, once or repeated.

        Returns:
            The parameter's name; "" if it is none.
        """
        origin = self.origin(_without_repetition(ids))
        if origin is None or origin.name in self.buffers:
            return ""
        if self.filters.setdefault(origin.name, origin.dim) != origin.dim:
            self.pin(ids, f"{origin.name} is a weight in both directions")
        return origin.name


def _without_repetition(ids: Ids | None) -> Ids | None:
    """Return the first of equal parts of ``ids``, such as the kernels that were mixed for each sample of a batch."""
    if ids is None or len(ids) < 2 or int((ids == ids[0]).sum()) == 1:
        return ids
    first = ids[: int((ids[1:] == ids[0]).nonzero()[0, 0]) + 1]
    times, rest = divmod(len(ids), len(first))
    return first if not rest and torch.equal(first.repeat(times), ids) else ids


def _labels_of(dims: dict[int, Ids]) -> Labels:
    return tuple((dims[dim],) for dim in range(len(dims)))
