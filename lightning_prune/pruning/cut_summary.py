"""Summaries of cuts and of the present network, for people and loggers."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.plan import Plan, Stop
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.utils.formatting import si

__all__ = ["CutSummary", "budget_warning", "size_metrics"]


@dataclass(frozen=True)
class CutSummary:
    """Summary of one cut, as plain numbers.

    Attributes:
        epoch: the epoch at whose end, or within which, it was made.
        filters: number of removed filters, over all layers.
        layers: number of layers that lost filters.
        before: resource -> cost before the cut.
        after: resource -> exact cost after the cut.
        share: resource -> share of the dense network's cost that remains.
        stopped: what ended the selection: ``"budget"``, ``"amount"`` or ``"limits"``.
        seconds: duration, proof included.
        step: number of optimizer steps before it, if it was made within an epoch.
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
    def between(
        cls,
        wide: ChannelGraph,
        narrow: ChannelGraph,
        dense: DenseSizes,
        stopped: Stop,
        epoch: int,
        seconds: float,
        step: int | None = None,
    ) -> CutSummary:
        """Summarise what was cut from the network of graph ``wide`` to get that of ``narrow``."""
        kept = narrow.widths()
        removed = [width - kept.get(name, 0) for name, width in wide.widths().items()]
        before, after = ({name: graph.cost(name) for name in wide.cost_models} for graph in (wide, narrow))
        return cls(
            epoch=epoch,
            filters=sum(removed),
            layers=sum(number > 0 for number in removed),
            before=before,
            after=after,
            share=dense.shares(narrow),
            stopped=stopped,
            seconds=seconds,
            step=step,
        )

    def __str__(self) -> str:
        costs = "".join(
            f" · {resource} {si(self.before[resource])} → {si(self.after[resource])} ({share:.1%} of dense)"
            for resource, share in self.share.items()
        )
        moment = f"epoch {self.epoch}" + ("" if self.step is None else f", step {self.step}")
        return f"{moment}: cut {self.filters} filters in {self.layers} layers{costs} · {self.seconds:.1f} s"


def size_metrics(graph: ChannelGraph, dense: DenseSizes) -> dict[str, float]:
    """Return what to log of the present network: costs, their shares of the dense ones, number of prunable units."""
    metrics = {f"prune/{resource}": float(graph.cost(resource)) for resource in graph.cost_models}
    metrics |= {f"prune/{resource}_share": share for resource, share in dense.shares(graph).items()}
    return {**metrics, "prune/units": float(len(graph.prunable))}


def budget_warning(policy: PruningPolicy, graph: ChannelGraph, dense: DenseSizes, last: Plan | None) -> str:
    """Return a warning that names the reached shares, the reason why they exceed the budget, and the remedy."""
    shares = dense.shares(graph)
    reached = ", ".join(f"{resource} {shares[resource]:.3f}" for resource in policy.budget)
    limited = last is not None and last.stopped == "limits"
    advice = "loosen limits or exclusions" if limited else "train for more epochs, or raise amount"
    ending = f" ({last.ending})" if last is not None and limited else ""
    return f"budget {dict(policy.budget)} not met: {reached} of the dense network remain; {advice}{ending}"
