"""Proof that a cut is right: the smaller network must meet what the dense one met (level 3).

The smaller network is traced again, starting from the ids that survive. It may tie only what the dense trace
tied, pin only what it pinned, and cost what was predicted. Where both traces meet the same operators, each tie
must be the dense one restricted to what stays, position by position. Last, each operator is tried on numbers
(:mod:`~lightning_prune.surgery.numerical_check`), so that a wrong rule shows as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lightning_prune.graph.channel_graph import ChannelGraph, DenseTrace
from lightning_prune.graph.trace import TraceError, analyse
from lightning_prune.surgery.numerical_check import mismatches
from lightning_prune.tracing.ids import Ids, Tie, Ties, Units
from lightning_prune.tracing.recorder import raised_in
from lightning_prune.tracing.tracker import Tracker
from lightning_prune.utils.modules import cut

__all__ = ["ProofError", "prove"]


Indices = Mapping[str, Mapping[int, list[int]]]


class ProofError(RuntimeError):
    """The smaller network does not compute what the dense one did.

    Attributes:
        units: the units that run through the offending operator, as far as it is known.
    """

    def __init__(self, message: str, units: Units) -> None:
        super().__init__(message)
        self.units = units


def prove(graph: ChannelGraph, kept: NDArray[np.bool_], indices: Indices) -> None:
    """Trace the network of ``graph``, from which all but ``kept`` was cut, and hold the trace against the dense one.

    Args:
        graph: the dense network's graph, with its evidence.
        kept: mask over units, shape (num_units,).
        indices: parameter or buffer -> dimension -> what the surgery kept.

    Raises:
        ProofError: the smaller network raises, or reads a channel that the dense one did not read there.
    """
    evidence = graph.evidence
    assert evidence is not None
    survives = np.append(kept, True)[evidence.unit_of]  # per component; those without a unit stay
    again = _retrace(graph, evidence, indices)
    _check_ties(graph, evidence, again)
    _check_pins(graph, evidence, again)
    _check_positions(graph, evidence, again, survives)
    _check_cost(graph, again, kept)
    if again.outputs != evidence.tracker.outputs:
        raise ProofError(f"the outputs would be {again.outputs}, not {evidence.tracker.outputs}", _none())
    _check_numbers(evidence, again, survives)


def _retrace(graph: ChannelGraph, evidence: DenseTrace, indices: Indices) -> Tracker:
    dense = evidence.tracker
    # The ids are cut by the very call that cut the tensors, so that a wrong cut shows.
    initial = {
        name: {
            dim: cut(ids, {0: indices[name][dim]}) if dim in indices.get(name, {}) else ids
            for dim, ids in dims.items()
        }
        for name, dims in dense.sources.items()
    }
    tracker = Tracker(dense.model, initial=initial, dense=dense, ties=Ties(count=dense.ties.count))
    try:
        analyse(tracker, evidence.inputs, evidence.kwargs, evidence.modes)
    except TraceError as error:
        cause = error.__cause__ or error
        module = raised_in(cause)
        raise ProofError(
            f"the smaller network raises in {module!r}: {cause}", _within(graph, module)
        ) from error
    except Exception as error:  # whatever a rule stumbles over: the smaller network cannot be followed
        where = tracker.where
        raise ProofError(
            f"the smaller network does not fit together: {error}", _through(graph, where)
        ) from error
    return tracker


def _none() -> Units:
    return np.empty(0, np.int64)


def _within(graph: ChannelGraph, module: str) -> Units:
    """Units bound to the parameters of a module, or of the nearest one around it that has any."""
    while True:
        names = [name for name in graph.bindings if not module or name.startswith(f"{module}.")]
        if names or not module:
            break
        module = module.rpartition(".")[0]
    units = [units for name in names for units in graph.bindings[name].values()]
    return np.unique(np.concatenate([*units, _none()])) if module else _none()


def _through(graph: ChannelGraph, where: str) -> Units:
    """Units that met the operator ``where`` in the dense trace."""
    evidence = graph.evidence
    assert evidence is not None
    met = [tie.left for tie in evidence.tracker.ties.ties if tie.where == where]
    units = [evidence.unit_of[evidence.components[ids.numpy()]] for ids in met]
    found = np.unique(np.concatenate([*units, _none()]))
    return found[found >= 0]


def _fail(graph: ChannelGraph, what: str, where: str) -> None:
    raise ProofError(f"{what} at {where or 'the output'}", _through(graph, where))


def _check_ties(graph: ChannelGraph, evidence: DenseTrace, again: Tracker) -> None:
    """No two units of the dense trace may be joined; ids made during the trace may join any one of them."""
    for tie, joined in _joined(evidence, again.ties):
        if joined:
            _fail(graph, "a filter would read the wrong channel", tie.where)


def _quotient(evidence: DenseTrace, ties: Ties) -> NDArray[np.int64]:
    """Node of each id of the second trace: its dense component, or a new node for ids made since."""
    made = ties.count - len(evidence.components)
    top = int(evidence.components.max(initial=-1)) + 1
    return np.concatenate([evidence.components, np.arange(top, top + made)])


def _joined(evidence: DenseTrace, ties: Ties) -> Iterator[tuple[Tie, bool]]:
    nodes = _quotient(evidence, ties)
    dense = int(evidence.components.max(initial=-1)) + 1
    edges = [(nodes[tie.left.numpy()], nodes[tie.right.numpy()]) for tie in ties.ties]
    left = np.concatenate([a for a, _ in edges] or [_none()])
    right = np.concatenate([b for _, b in edges] or [_none()])
    size = int(nodes.max(initial=-1)) + 1
    matrix = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(size, size))
    labels = connected_components(matrix, directed=False)[1]
    crowded = np.bincount(labels[:dense], minlength=size) > 1
    for tie, (a, b) in zip(ties.ties, edges, strict=True):
        yield tie, bool((crowded[labels[a]] & (a != b)).any())


def _check_pins(graph: ChannelGraph, evidence: DenseTrace, again: Tracker) -> None:
    known = len(evidence.components)
    for pin in again.ties.pins:
        ids = pin.ids[pin.ids < known].numpy()
        units = evidence.unit_of[evidence.components[ids]]
        if (~evidence.pinned[evidence.components[ids]] & (units >= 0)).any():
            raise ProofError(
                f"a channel {pin.reason} only in the smaller network, at {pin.where}", np.unique(units)
            )


def _check_positions(
    graph: ChannelGraph, evidence: DenseTrace, again: Tracker, survives: NDArray[np.bool_]
) -> None:
    """Tie by tie, where both traces met the same operators in the same order."""
    before, after = evidence.tracker.ties.ties, again.ties.ties
    for old, new in zip(before, after, strict=False):
        if _operator(old) != _operator(new):
            return  # the code took another way, or a dimension of one element was met
        for was, now in ((old.left, new.left), (old.right, new.right)):
            if not _restricted(evidence, was, now, survives):
                _fail(graph, "a filter would read its channels in another order", new.where)


def _operator(tie: Tie) -> str:
    return tie.where


def _restricted(evidence: DenseTrace, was: Ids, now: Ids, survives: NDArray[np.bool_]) -> bool:
    known = len(evidence.components)
    if bool((now >= known).any()):
        return True  # made during the trace: checked by the ties themselves
    dense = evidence.components[was.numpy()]
    return np.array_equal(dense[survives[dense]], evidence.components[now.numpy()])


def _check_cost(graph: ChannelGraph, again: Tracker, kept: NDArray[np.bool_]) -> None:
    if len(again.costs) != len(graph.terms["macs"]):
        return  # torch multiplies instead of contracting where one element is left
    predicted = graph.cost_models["macs"].total(kept)
    found = sum(cost.scale * int(np.prod([len(ids) for ids in cost.factors])) for cost in again.costs)
    if found != predicted:
        raise ProofError(f"the smaller network takes {found} MACs, {predicted} were predicted", _none())


def _check_numbers(evidence: DenseTrace, again: Tracker, survives: NDArray[np.bool_]) -> None:
    """Operator by operator, on random numbers: what the rules say must also be so."""
    alive = survives[evidence.components]
    for followed, what in mismatches(evidence.tracker.followed, again.followed, alive):
        ids = [ids for labels in followed.labels for arrays in labels for ids in arrays]
        units = np.unique(evidence.unit_of[evidence.components[torch.cat(ids).numpy()]])
        raise ProofError(f"{followed.call} {what}", units[units >= 0])
