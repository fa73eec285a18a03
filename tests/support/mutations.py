"""Ways to plant a fault in the rules of tracing or in surgery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.ids import Ids, Tie
from lightning_prune.tracing.rules.registry import RULES
from lightning_prune.tracing.tracker import Labels, Tracker

aten = torch.ops.aten
Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]


def replaced(*operators: Any, by: Callable[[OperatorCall, Tracker], None]) -> Plant:
    """Replace the rule of some operators."""

    def plant(patch: Patch) -> None:
        for operator in operators:
            for name in operator.overloads():
                overload = getattr(operator, name)
                if overload in RULES:
                    patch.setitem(RULES, overload, by)

    return plant


def wrapped(*operators: Any, by: Callable[[OperatorCall, Tracker, Callable[[], None]], None]) -> Plant:
    """Call ``by`` in place of the rule, with the rule as its third argument."""

    def plant(patch: Patch) -> None:
        for operator in operators:
            _wrap(patch, operator, by)

    return plant


def _wrap(
    patch: Patch, operator: Any, by: Callable[[OperatorCall, Tracker, Callable[[], None]], None]
) -> None:
    for name in operator.overloads():
        overload = getattr(operator, name)
        pointwise = RULES[aten.add.Tensor] if torch.Tag.pointwise in overload.tags else None
        if (right := RULES.get(overload, pointwise)) is not None:
            patch.setitem(RULES, overload, _around(right, by))


def _around(right: Any, by: Any) -> Callable[[OperatorCall, Tracker], None]:
    return lambda call, tracker: by(call, tracker, lambda: right(call, tracker))


def relabelled(*operators: Any, change: Callable[[OperatorCall, Labels], Sequence[Sequence[Ids]]]) -> Plant:
    """Call the rule, then change the labels of its first result."""

    def by(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
        right()
        out = call.outputs[0]
        tracker.label(out, change(call, tracker.labels(out)))

    return wrapped(*operators, by=by)


def untied(*operators: Any, only: Callable[[Tie], bool] = lambda tie: True) -> Plant:
    """Call the rule, then delete the ties that it has made."""

    def by(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
        num_before = len(tracker.ties.ties)
        right()
        tracker.ties.ties[num_before:] = [tie for tie in tracker.ties.ties[num_before:] if not only(tie)]

    return wrapped(*operators, by=by)


def retied(*operators: Any, change: Callable[[Ids], Ids]) -> Plant:
    """Call the rule, then let its ties join other positions."""

    def by(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
        num_before = len(tracker.ties.ties)
        right()
        new = [Tie(tie.left, change(tie.right), tie.where) for tie in tracker.ties.ties[num_before:]]
        tracker.ties.ties[num_before:] = new

    return wrapped(*operators, by=by)


def unpinned(*operators: Any) -> Plant:
    """Call the rule, then delete the pins that it has made."""

    def by(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
        num_before = len(tracker.ties.pins)
        right()
        del tracker.ties.pins[num_before:]

    return wrapped(*operators, by=by)


def unused(*operators: Any) -> Plant:
    """Call the rule, then delete the uses of sizes that it has registered."""

    def by(call: OperatorCall, tracker: Tracker, right: Callable[[], None]) -> None:
        num_before = len(tracker.size_uses)
        right()
        del tracker.size_uses[num_before:]

    return wrapped(*operators, by=by)


def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Plant:
    """Replace a function of the engine by ``make`` of it."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def along(
    dim: int, change: Callable[[Ids], Ids]
) -> Callable[[OperatorCall, Labels], Sequence[Sequence[Ids]]]:
    """Change the ids along one dimension."""
    return lambda call, labels: [
        [change(ids) for ids in arrays] if d == dim % len(labels) else arrays
        for d, arrays in enumerate(labels)
    ]


def tiled(times: int) -> Callable[[Ids], Ids]:
    """Tile ids that should be repeated: ``abab`` instead of ``aabb``."""
    return lambda ids: ids.view(-1, times).t().flatten() if len(ids) % times == 0 else ids


def rolled(ids: Ids) -> Ids:
    """Move all ids by one position."""
    return ids.roll(1)


def flipped(ids: Ids) -> Ids:
    """Reverse all ids."""
    return ids.flip(0)
