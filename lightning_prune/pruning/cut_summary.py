"""What a cut did and where a network stands, for people and loggers (level 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.plan import Plan, Stop
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.utils.formatting import si

__all__ = ["CutSummary", "facts", "unmet"]


@dataclass(frozen=True)
class CutSummary:
    """The facts of one cut, as plain numbers.

    Attributes:
        epoch: at whose end, or within which, it was made.
        filters: how many went, over all layers.
        layers: how many layers lost some.
        before: resource -> cost before it.
        after: resource -> exact cost after it.
        share: resource -> what remains of the dense network's.
        stopped: what ended the selection: ``"budget"``, ``"amount"`` or ``"limits"``.
        seconds: how long it took, proof included.
        step: the number of optimizer steps before it, if it was made within the epoch.
    """

    epoch: int
    filters: int
    layers: int
    before: dict[str, int]
    after: dict[str, int]
    share: dict[str, float]
    stopped: str
    seconds: float
    step: int | None = None

    @classmethod
    def of(
        cls, graph: ChannelGraph, plan: Plan, epoch: int, seconds: float, step: int | None = None
    ) -> CutSummary:
        """The facts of carrying out ``plan`` on the network of ``graph``."""
        gone = [int(np.isin(units, plan.remove).sum()) for units in graph.layers.values()]
        before = {resource: spent.before for resource, spent in plan.costs.items()}
        after = {resource: spent.after for resource, spent in plan.costs.items()}
        share = {resource: spent.share for resource, spent in plan.costs.items()}
        facts = before, after, share, plan.stopped, seconds, step
        return cls(epoch, sum(gone), sum(n > 0 for n in gone), *facts)

    @classmethod
    def between(
        cls,
        wide: ChannelGraph,
        narrow: ChannelGraph,
        dense: DenseSizes,
        stopped: Stop,
        epoch: int,
        seconds: float,
    ) -> CutSummary:
        """The facts of all that was cut from one network to get the other."""
        left = narrow.widths()
        gone = [width - left[name] for name, width in wide.widths().items()]
        before, after = ({name: graph.cost(name) for name in wide.cost_models} for graph in (wide, narrow))
        facts = before, after, dense.shares(narrow), stopped, seconds
        return cls(epoch, sum(gone), sum(n > 0 for n in gone), *facts)

    def __str__(self) -> str:
        costs = "".join(
            f" · {resource} {si(self.before[resource])} → {si(self.after[resource])} ({share:.1%} of dense)"
            for resource, share in self.share.items()
        )
        gone = f"cut {self.filters} filters in {self.layers} layers"
        when = f"epoch {self.epoch}" + ("" if self.step is None else f", step {self.step}")
        return f"{when}: {gone}{costs} · {self.seconds:.1f} s"


def facts(graph: ChannelGraph, dense: DenseSizes) -> dict[str, float]:
    """What there is now, for a logger: costs, their share of the dense ones, units that could still go."""
    found = {f"prune/{resource}": float(graph.cost(resource)) for resource in graph.cost_models}
    found |= {f"prune/{resource}_share": share for resource, share in dense.shares(graph).items()}
    return {**found, "prune/units": float(len(graph.prunable))}


def unmet(rules: PruningPolicy, graph: ChannelGraph, dense: DenseSizes, last: Plan | None) -> str:
    """Why pruning ended above the budget, and what can be done about it."""
    shares = dense.shares(graph)
    reached = ", ".join(f"{resource} {shares[resource]:.3f}" for resource in rules.budget)
    limited = last is not None and last.stopped == "limits"
    way_out = "loosen limits or exclusions" if limited else "train for more epochs, or raise amount"
    ending = f" ({last.ending})" if last is not None and limited else ""
    return f"budget {dict(rules.budget)} not met: {reached} of the dense network remain; {way_out}{ending}"
