"""What a selection comes to: which units go, and what that does to every resource (level 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_prune.utils.formatting import si

__all__ = ["Plan", "ResourceChange", "Stop", "si"]

Stop = Literal["budget", "amount", "limits"]


@dataclass(frozen=True)
class ResourceChange:
    """What a plan does to one resource.

    Attributes:
        before: cost before the cut.
        after: exact cost after it.
        dense: cost of the network that was never cut.
        target: the budget, or None where there is none for this resource.
    """

    before: int
    after: int
    dense: int
    target: float | None = None

    @property
    def met(self) -> bool:
        """Whether the budget, if any, is kept after the cut."""
        return self.target is None or self.after <= self.target

    @property
    def share(self) -> float:
        """What remains of the dense network's cost."""
        return self.after / max(self.dense, 1)

    def __str__(self) -> str:
        share = f"{self.share:.1%} of dense"
        goal = "" if self.target is None else f", budget {self.target / max(self.dense, 1):.1%}"
        return f"{si(self.before)} → {si(self.after)} ({share}{goal})"


@dataclass(frozen=True)
class Plan:
    """Which units to remove, and what that does. Iterating gives the units.

    Attributes:
        remove: units in the order in which they were taken, shape (number,).
        costs: resource -> its cost before and after, exact.
        stopped: what ended the selection: the ``"budget"`` is met, the ``"amount"`` of this step is used up,
            or the ``"limits"`` leave nothing else to remove.
        closed: layer or block -> why it loses no more filters.
    """

    remove: NDArray[np.int64]
    costs: Mapping[str, ResourceChange]
    stopped: Stop
    closed: Mapping[str, str] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        """Whether every budget is met after this cut."""
        return all(spent.met for spent in self.costs.values())

    def __iter__(self) -> Iterator[int]:
        return iter(self.remove.tolist())

    def __len__(self) -> int:
        return len(self.remove)

    def __str__(self) -> str:
        costs = " · ".join(f"{resource} {spent}" for resource, spent in self.costs.items())
        return f"{len(self)} units · {costs} · {self.ending}"

    @property
    def ending(self) -> str:
        """What ended the selection, in words."""
        if self.reached:
            return "budget met"
        if self.stopped == "amount":
            return "more in the next step"
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.closed.items())[:3])
        more = f" and {len(self.closed) - 3} more" if len(self.closed) > 3 else ""
        return f"budget not met, no candidate left ({reasons or 'all filters are pinned or excluded'}{more})"
