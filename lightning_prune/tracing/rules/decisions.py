"""Decisions that the sizes of an operator alone do not settle, taken in the smaller network as in the dense one."""

from __future__ import annotations

from typing import TypeVar

from lightning_prune.tracing.tracker import Tracker

__all__ = ["as_in_dense"]

Decision = TypeVar("Decision")


def as_in_dense(name: str, decision: Decision, tracker: Tracker) -> Decision:
    """Return the decision of the dense network for the current operator, or ``decision`` in the dense network itself.

    A cut may leave one channel, and a dimension of one element is ambiguous: a grouped convolution looks depthwise, a
    tensor looks broadcast. The smaller network is therefore read as the dense one; the proof checks the result.

    Args:
        name: of the decision, unique within the rule.
        decision: what the current sizes suggest.
        tracker: stores the result, for the trace of a smaller network.
    """
    dense = tracker.dense_decision(name)
    result: Decision = decision if dense is None else dense
    tracker.record_decision(name, result)
    return result
