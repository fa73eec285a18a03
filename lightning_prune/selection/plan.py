"""The result of a selection: which units to remove, and how that changes every resource."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.summary import NetworkSummary, summarise
from lightning_prune.utils.formatting import counted, si

__all__ = ["Plan", "ResourceChange", "Stop", "si"]

Stop = Literal["budget", "amount", "limits"]


@dataclass(frozen=True)
class ResourceChange:
    """Change of one resource by a plan.

    Attributes:
        before: cost before the cut.
        after: exact cost after the cut.
        dense: cost of the dense network, before any cut.
        target: the budget, or None if this resource has none.
    """

    before: int
    after: int
    dense: int
    target: float | None = None

    @property
    def met(self) -> bool:
        """Whether the budget, if there is one, is met after the cut."""
        return self.target is None or self.after <= self.target

    @property
    def share(self) -> float:
        """Cost after the cut as a share of the dense network's cost."""
        return self.after / max(self.dense, 1)

    def __str__(self) -> str:
        share = f"{self.share:.1%} of dense"
        goal = "" if self.target is None else f", budget {self.target / max(self.dense, 1):.1%}"
        return f"{si(self.before)} → {si(self.after)} ({share}{goal})"


@dataclass(frozen=True, repr=False)
class Plan:
    """The units to remove, and how that changes every resource. Iterating over a plan gives the units.

    Attributes:
        remove: units in the order in which they were selected, shape (number,).
        costs: resource -> its exact cost before and after.
        stopped: why the selection ended: the ``"budget"`` is met, the ``"amount"`` of this step is used up,
            or the ``"limits"`` leave nothing else to remove.
        closed: layer or block -> why it loses no more filters.
        graph: the network that the plan was made for, without its trace; None in a plan made by hand, and in copies.
        gap: of an optimal selection, how much more importance than necessary the plan may remove, as a share of what
            it removes, among the widths that were compared last; infinite if unknown. None for a greedy selection.
        blocks: names of residual blocks that vanish; what only they have is not among the units.
        vanished: names of the modules that go with them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_prune import L2, prune_, select, trace
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> graph = trace(net, torch.zeros(1, 1, 8, 8))
        >>> plan = select(graph, L2()(graph, net), {"macs": 0.5})
        >>> len(plan), plan.stopped
        (4, 'budget')
        >>> record = prune_(net, graph, plan)
    """

    remove: NDArray[np.int64]
    costs: Mapping[str, ResourceChange]
    stopped: Stop
    closed: Mapping[str, str] = field(default_factory=dict)
    graph: ChannelGraph | None = field(default=None, repr=False, compare=False)
    gap: float | None = field(default=None, compare=False)
    blocks: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()

    @property
    def reached(self) -> bool:
        """Whether every budget is met after this cut."""
        return all(change.met for change in self.costs.values())

    def __iter__(self) -> Iterator[int]:
        return iter(self.remove.tolist())

    def __len__(self) -> int:
        return len(self.remove)

    def __bool__(self) -> bool:
        return bool(len(self.remove) or self.blocks)

    def __getstate__(self) -> dict[str, Any]:
        # Ranks send plans to each other. The graph is large, and its costs may be functions that nobody can pickle.
        return {**vars(self), "graph": None}

    def __str__(self) -> str:
        costs = " · ".join(f"{resource} {change}" for resource, change in self.costs.items())
        blocks = f"{_blocks(self.blocks)} · " if self.blocks else ""
        return f"{blocks}{counted(len(self), 'unit')} · {costs} · {self.ending}"

    def __repr__(self) -> str:
        return f"Plan({self})"

    def summary(self) -> NetworkSummary:
        """Return channels, MACs, parameters and other resources of each layer before and after the cut.

        With what is pinned and why, and which layers are coupled. Printed, it fits the terminal; as the last value
        of a notebook's cell it is a table; ``save("plan.html")``, ``.json`` or ``.txt`` writes it.

        Raises:
            ValueError: the plan has no graph.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from lightning_prune import L2, select, trace
            >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
            >>> graph = trace(net, torch.zeros(1, 1, 8, 8))
            >>> text = select(graph, L2()(graph, net), {"macs": 0.5}).summary().text(width=60)
            >>> print(text.replace("\\n\\n", "\\n"))
            MACs 3.74k → 1.87k, 50.0% left (budget 1.87k)
            parameters 153 → 77, 50.3% left
            layer  channels          MACs
            ────────────────────────────────
            0         8 → 4  2.59k → 1.3k
            2             1   1.15k → 576  ¹
            ¹ 1 pinned: is the network's output - 2
            budget met
        """
        if self.graph is None:
            raise ValueError(
                "this plan was made by hand, copied or pickled: only that of select(graph, ...) knows its network"
            )
        targets = {name: change.target for name, change in self.costs.items() if change.target is not None}
        notes = [f"gone as a whole: {_blocks(self.blocks)}, {', '.join(self.blocks)}"] if self.blocks else []
        return summarise(
            self.graph, self.remove, targets, self.closed, [*notes, self.ending], vanished=self.vanished
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>" if self.graph is None else self.summary().html()

    @property
    def ending(self) -> str:
        """The reason why the selection ended, as text."""
        if self.reached:
            return f"budget met{self._quality}"
        if self.stopped == "amount":
            return f"more in the next step{self._quality}"
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.closed.items())[:3])
        more = f" and {len(self.closed) - 3} more" if len(self.closed) > 3 else ""
        return f"budget not met, no candidate left ({reasons or 'all filters are pinned or excluded'}{more})"

    @property
    def _quality(self) -> str:
        """How good an optimal selection is, as text."""
        if self.gap is None or not math.isfinite(self.gap):
            return ""
        return (
            f", at most {self.gap:.1%} more importance removed than necessary"
            if self.gap >= 5e-4
            else ", optimal"
        )


def _blocks(names: Sequence[str]) -> str:
    return f"{len(names)} block{'s' * (len(names) != 1)}"
