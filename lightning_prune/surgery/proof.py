"""Prove that a cut is right, by a trace of the smaller network, or without it where the dense trace is enough.

The smaller network is traced again, starting from the ids that survive. It may tie and pin only what the dense trace
tied and pinned, and must cost what was predicted. As long as both traces contain the same operators,
each tie must be the surviving part of the dense one, position by position. Last, each operator is run on numbers
(:mod:`~lightning_prune.surgery.numerical_check`), so that a wrong rule of tracing shows as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace
from lightning_prune.graph.trace import TraceError, analyse
from lightning_prune.surgery.known_code import is_known_code
from lightning_prune.surgery.local_proof import is_proven
from lightning_prune.surgery.numerical_check import added, mismatches
from lightning_prune.surgery.passed_sizes import Changes
from lightning_prune.tracing.ids import Ids, Tie, Ties, Units
from lightning_prune.tracing.recorder import raised_in
from lightning_prune.tracing.tracker import TracedOperator, Tracker
from lightning_prune.tracing.unreached import readable, unreached_layers
from lightning_prune.utils.modules import cut

__all__ = ["ProofError", "concerned_units", "prove"]

#: Parameter or buffer -> dimension -> surviving indices.
Indices = Mapping[str, Mapping[int, list[int]]]


class ProofError(RuntimeError):
    """The smaller network does not compute what the dense one did.

    Attributes:
        units: the units that the operator at fault reads, as far as it is known.
        module: name of the module in which it runs; "" if it is not known, or the network itself.
    """

    def __init__(self, message: str, units: Units, module: str = "") -> None:
        super().__init__(message)
        self.units, self.module = units, module


def prove(
    graph: ChannelGraph, kept: NDArray[np.bool_], indices: Indices, changes: Changes | None = None
) -> None:
    """Trace the network of ``graph``, which has been cut to ``kept``, and compare the trace with the dense one.

    A network of known packages (:mod:`~lightning_prune.surgery.known_code`) is not traced where the dense trace shows
    already that the cut is right (:mod:`~lightning_prune.surgery.local_proof`).

    Args:
        graph: graph of the dense network, with its trace.
        kept: mask over units, shape (num_units,).
        indices: parameter or buffer -> dimension -> indices that surgery has kept.
        changes: the attributes that surgery has set; None: the network is traced in any case.

    Raises:
        ProofError: the smaller network raises, or computes something else than the dense one.
    """
    evidence = graph.evidence
    assert evidence is not None
    if changes is not None and is_known_code(evidence.tracker.model) and is_proven(graph, kept, changes):
        return
    survives = np.append(kept, True)[evidence.unit_of]  # per component; those without a unit (-1) survive
    small = _retrace(graph, evidence, indices)
    _check_ties(graph, evidence, small)
    _check_pins(graph, evidence, small)
    _check_positions(graph, evidence, small, survives)
    _check_cost(graph, evidence, small, kept)
    if (outputs := small.outputs) != (expected := evidence.tracker.outputs):
        raise ProofError(f"the smaller network returns {outputs}, expected {expected}", _no_units())
    _check_numbers(evidence, small, survives)
    _check_unreached(evidence, small, survives)


def _retrace(graph: ChannelGraph, evidence: DenseTrace, indices: Indices) -> Tracker:
    dense = evidence.tracker
    # The ids are cut by the same function and indices as the tensors, so that wrong indices show.
    initial = {
        name: {
            dim: cut(ids, {0: indices[name][dim]}) if dim in indices.get(name, {}) else ids
            for dim, ids in dims.items()
        }
        for name, dims in dense.sources.items()
    }
    tracker = Tracker(dense.model, initial=initial, dense=dense, ties=Ties(count=dense.ties.count))
    try:
        analyse(tracker, evidence.examples, evidence.modes)
    except TraceError as error:
        cause = error.__cause__ or error
        module = raised_in(cause)
        raise ProofError(
            f"the smaller network raises in {module!r}: {cause}", _units_within(graph, module), module
        ) from error
    except Exception as error:  # a rule may raise anything if the shapes of the smaller network do not match
        raise ProofError(
            f"the smaller network cannot be traced: {error}",
            _units_at(graph, tracker.where),
            _module_of(tracker.where),
        ) from error
    if dense.modes_alike and not tracker.modes_alike:
        raise ProofError(
            "the smaller network may do something else in train mode, the dense one not", _no_units()
        )
    return tracker


def _no_units() -> Units:
    return np.empty(0, np.int64)


def _units_within(graph: ChannelGraph, module: str) -> Units:
    """Return the units of the parameters of a module, or of the nearest module around it that has any."""
    while True:
        names = [name for name in graph.bindings if not module or name.startswith(f"{module}.")]
        if names or not module:
            break
        module = module.rpartition(".")[0]
    units = [units for name in names for units in graph.bindings[name].values()]
    return np.unique(np.concatenate([*units, _no_units()])) if module else _no_units()


def _units_at(graph: ChannelGraph, where: str) -> Units:
    """Return the units that the operator ``where`` ties in the dense trace."""
    evidence = graph.evidence
    assert evidence is not None
    tied_ids = [tie.left for tie in evidence.tracker.ties.ties if tie.where == where]
    return _units_of(evidence, *tied_ids)


def _units_of(evidence: DenseTrace, *ids: Ids) -> Units:
    """Return the units of ids of the dense trace, sorted."""
    units = [evidence.unit_of[evidence.components[array.numpy()]] for array in ids]
    all_units = np.unique(np.concatenate([*units, _no_units()]))
    return all_units[all_units >= 0]


def _fail(graph: ChannelGraph, problem: str, where: str) -> None:
    raise ProofError(f"{problem} at {where or 'the output'}", _units_at(graph, where), _module_of(where))


def _module_of(where: str) -> str:
    """Return the module that the description of an operator names."""
    return where.partition(" in ")[2].partition(",")[0]


def concerned_units(graph: ChannelGraph, error: ProofError, remove: Units) -> Units:
    """Return the units that the error names, or if none of them was removed, those that were, the nearest ones first.

    Whoever pins the result and selects again makes another cut.
    """
    if np.isin(error.units, remove).any():
        return error.units
    module = error.module
    while module:
        removed = np.intersect1d(_units_within(graph, module), remove)
        if len(removed):
            return removed
        module = module.rpartition(".")[0]
    return remove


def _check_ties(graph: ChannelGraph, evidence: DenseTrace, small: Tracker) -> None:
    """Raise if the second trace joins two components of the dense trace.

    Ids that were made during the second trace may be joined with any one component. Where the code branches on
    values, the smaller network may take a branch that the dense one did not; it may read channels that all stay.
    """
    branches = evidence.tracker.branches_on_values
    for tie in _joining_ties(evidence, small.ties):
        if not (branches and _are_pinned(evidence, tie)):
            known = [ids[ids < len(evidence.components)] for ids in (tie.left, tie.right)]
            units = np.union1d(_units_at(graph, tie.where), _units_of(evidence, *known))
            problem = f"a filter would read the wrong channel at {tie.where or 'the output'}"
            raise ProofError(problem, units, _module_of(tie.where))


def _are_pinned(evidence: DenseTrace, tie: Tie) -> bool:
    """Return whether both sides of a tie consist of ids of the dense trace that must stay."""
    ids = torch.cat((tie.left, tie.right)).numpy()
    return bool((ids < len(evidence.components)).all()) and bool(
        evidence.pinned[evidence.components[ids]].all()
    )


def _nodes(evidence: DenseTrace, ties: Ties) -> NDArray[np.int64]:
    """Node of each id of the second trace: its dense component, or a new node for an id made during that trace."""
    num_new = ties.count - len(evidence.components)
    num_components = int(evidence.components.max(initial=-1)) + 1
    return np.concatenate([evidence.components, np.arange(num_components, num_components + num_new)])


def _joining_ties(evidence: DenseTrace, ties: Ties) -> Iterator[Tie]:
    """Yield each tie of the second trace that takes part in joining two dense components."""
    nodes = _nodes(evidence, ties)
    num_components = int(evidence.components.max(initial=-1)) + 1
    left, right = (nodes[_joined([getattr(tie, side) for tie in ties.ties])] for side in ("left", "right"))
    size = int(nodes.max(initial=-1)) + 1
    joins = left != right
    if not joins.any():
        return
    matrix = coo_matrix((np.ones(joins.sum(), np.int8), (left[joins], right[joins])), shape=(size, size))
    labels = connected_components(matrix, directed=False)[1]
    joined = np.bincount(labels[:num_components], minlength=size) > 1
    if not joined.any():
        return
    for tie in ties.ties:
        a, b = nodes[tie.left.numpy()], nodes[tie.right.numpy()]
        if (joined[labels[a]] & (a != b)).any():
            yield tie


def _joined(arrays: Sequence[Ids]) -> NDArray[np.int64]:
    return torch.cat([*arrays, torch.empty(0, dtype=torch.int64)]).numpy()


def _check_pins(graph: ChannelGraph, evidence: DenseTrace, small: Tracker) -> None:
    """Raise if the second trace pins a unit that the dense trace did not pin."""
    for pin in small.ties.pins:
        components = evidence.components[pin.ids[pin.ids < len(evidence.components)].numpy()]
        units = evidence.unit_of[components]
        if (~evidence.pinned[components] & (units >= 0)).any():
            raise ProofError(
                f"a channel {pin.reason} only in the smaller network, at {pin.where}", np.unique(units)
            )


def _check_positions(
    graph: ChannelGraph, evidence: DenseTrace, small: Tracker, survives: NDArray[np.bool_]
) -> None:
    """Compare the ties of both traces one by one, as long as the same operators made them."""
    pairs = list(takewhile(_same_place, zip(evidence.tracker.ties.ties, small.ties.ties, strict=False)))
    if _are_surviving_parts(evidence, pairs, survives):
        return
    for dense_tie, tie in pairs:  # find the one at fault
        for dense_ids, ids in ((dense_tie.left, tie.left), (dense_tie.right, tie.right)):
            if not _is_surviving_part(evidence, dense_ids, ids, survives):
                _fail(graph, "a filter would read its channels in another order", tie.where)


def _same_place(pair: tuple[Tie, Tie]) -> bool:
    """Whether one operator made both; if not, the smaller network runs others, or a dimension has one element."""
    return pair[0].where == pair[1].where


def _are_surviving_parts(
    evidence: DenseTrace, pairs: Sequence[tuple[Tie, Tie]], survives: NDArray[np.bool_]
) -> bool:
    """Return whether each array of the second trace is the surviving part of its partner, compared all at once."""
    couples = [
        couple for dense, tie in pairs for couple in ((dense.left, tie.left), (dense.right, tie.right))
    ]
    owner = np.repeat(np.arange(len(couples)), [ids.numel() for _, ids in couples])
    is_new = _joined([ids for _, ids in couples]) >= len(evidence.components)
    # Arrays with ids made during the second trace are checked by _check_ties.
    left_out = set(owner[is_new].tolist())
    couples = [couple for at, couple in enumerate(couples) if at not in left_out]
    dense_arrays, arrays = [ids for ids, _ in couples], [ids for _, ids in couples]
    dense = evidence.components[_joined(dense_arrays)]
    kept = survives[dense]
    ends = np.cumsum([ids.numel() for ids in dense_arrays], dtype=np.int64)
    remaining = np.diff(np.append(0, np.cumsum(np.append(0, kept))[ends]))
    return np.array_equal(remaining, [ids.numel() for ids in arrays]) and np.array_equal(
        dense[kept], evidence.components[_joined(arrays)]
    )


def _is_surviving_part(evidence: DenseTrace, dense_ids: Ids, ids: Ids, survives: NDArray[np.bool_]) -> bool:
    if bool((ids >= len(evidence.components)).any()):
        return True  # ids made during the second trace are checked by _check_ties
    dense = evidence.components[dense_ids.numpy()]
    return np.array_equal(dense[survives[dense]], evidence.components[ids.numpy()])


def _check_cost(graph: ChannelGraph, evidence: DenseTrace, small: Tracker, kept: NDArray[np.bool_]) -> None:
    """Raise if the smaller network's MACs are not those predicted."""
    if len(small.costs) != len(graph.terms["macs"]):
        return  # where one element is left, torch multiplies pointwise instead of contracting
    fixed = [at for at, cost in enumerate(evidence.tracker.costs) if not cost.after_values]
    predicted = int(graph.cost_models["macs"].per_term(kept)[fixed].sum())
    costs = [small.costs[at] for at in fixed]
    actual = sum(cost.scale * int(np.prod([len(ids) for ids in cost.factors])) for cost in costs)
    if actual != predicted:
        raise ProofError(f"the smaller network takes {actual} MACs, predicted were {predicted}", _no_units())


def _check_unreached(evidence: DenseTrace, small: Tracker, survives: NDArray[np.bool_]) -> None:
    """Raise if the cut takes channels that a layer in a branch that no example takes may read or write."""
    reached = unreached_layers(small).keys()
    layers = {name: layer for name, layer in unreached_layers(evidence.tracker).items() if name in reached}
    lost = [
        ids
        for ids in readable(evidence.tracker, layers.values())
        if not survives[evidence.components[ids]].all()
    ]
    if lost:
        names = ", ".join(list(layers)[:3])
        raise ProofError(
            f"no example reaches {names}, which could read what is cut", _units_of(evidence, *lost)
        )


def _check_numbers(evidence: DenseTrace, small: Tracker, survives: NDArray[np.bool_]) -> None:
    """Raise if an operator of the smaller network computes something else on random numbers."""
    alive = survives[evidence.components]
    dense = evidence.tracker
    floats_change = any(not alive[ids.numpy()].all() for ids in dense.float_ids)
    for operator, problem in mismatches(dense.operators, small.operators, alive, floats_change):
        raise ProofError(f"{operator.call} {problem}", _units_read(evidence, operator))
    for operator in () if dense.branches_on_values else added(dense.operators, small.operators):
        problem = "runs in the smaller network only: its code depends on a number of channels"
        raise ProofError(f"{operator.call} {problem}", _units_read(evidence, operator))


def _units_read(evidence: DenseTrace, operator: TracedOperator) -> Units:
    """Return the units of all tensors of an operator."""
    arrays = [ids for labels in operator.labels for dims in labels for ids in dims]
    return _units_of(evidence, *(ids[ids < len(evidence.components)] for ids in arrays))
