"""Summaries of cuts and of the present network, for people and loggers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from lightning_prune.compensation.report import CompensationReport
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.summary_html import html_table
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.plan import Plan, Stop
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.utils.formatting import amounts, counted, si

__all__ = ["CutSummary", "History", "budget_warning", "size_metrics"]


@dataclass(frozen=True, repr=False)
class CutSummary:
    """Summary of one cut, as plain numbers.

    Attributes:
        epoch: the epoch at whose end, or within which, it was made; None in a training that counts steps only.
        filters: number of removed filters, over all layers.
        layers: number of layers that lost filters.
        before: resource -> cost before the cut.
        after: resource -> exact cost after the cut.
        share: resource -> share of the dense network's cost that remains.
        stopped: what ended the selection: ``"budget"``, ``"amount"`` or ``"limits"``.
        seconds: duration, proof included.
        step: number of optimizer steps before it, if it was made within an epoch.
        change: squared distance of the outputs from those before the cut, as a share of their variance, on training
            images that took no part in the repair; None if it was not measured.
        change_unrepaired: the same before the repair.
        not_repaired: why the cut was not repaired; empty if it was, or if nobody asked for it.
        left_alone: layer -> why it was not repaired.
    """

    epoch: int | None
    filters: int
    layers: int
    before: dict[str, int]
    after: dict[str, int]
    share: dict[str, float]
    stopped: str
    seconds: float
    step: int | None = None
    change: float | None = None
    change_unrepaired: float | None = None
    not_repaired: str = ""
    left_alone: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        wide: ChannelGraph,
        narrow: ChannelGraph,
        dense: DenseSizes,
        stopped: Stop,
        epoch: int | None,
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

    def with_repair(self, report: CompensationReport) -> CutSummary:
        """Return the summary with the outcome of the cut's repair."""
        before, after = report.change_before, report.change_after if report.accepted else report.change_before
        return replace(
            self,
            change=None if math.isnan(after) else after,
            change_unrepaired=None if math.isnan(before) else before,
            not_repaired=report.reason,
            left_alone=dict(report.left_alone),
        )

    @property
    def moment(self) -> str:
        """Epoch and step of the cut."""
        numbers = {"epoch": self.epoch, "step": self.step}
        return ", ".join(f"{name} {number}" for name, number in numbers.items() if number is not None)

    @property
    def metrics(self) -> dict[str, float]:
        """Return what to log of the cut."""
        changes = {"prune/change": self.change, "prune/change_unrepaired": self.change_unrepaired}
        return {name: value for name, value in changes.items() if value is not None}

    @property
    def repair_line(self) -> str:
        """Result of the repair as the end of a line; empty if there was none."""
        if self.not_repaired:
            return f" · not repaired: {self.not_repaired}"
        if self.change is None:
            return ""
        alone = f" (left alone: {len(self.left_alone)})" if self.left_alone else ""
        return f" · repaired {self.change_unrepaired:.2g} → {self.change:.2g}{alone}"

    def __repr__(self) -> str:
        return f"CutSummary({self})"

    def __str__(self) -> str:
        costs = "".join(
            f" · {resource} {si(self.before[resource])} → {si(self.after[resource])} ({share:.1%} of dense)"
            for resource, share in self.share.items()
        )
        cut = f"cut {counted(self.filters, 'filter')} in {counted(self.layers, 'layer')}"
        return f"{self.moment}: {cut}{costs}{self.repair_line} · {self.seconds:.1f} s"


class History(list[CutSummary]):
    """The cuts of a training, in order. Printed, one line per cut; as the last value of a notebook's cell, a table.

    Example:
        >>> cut = CutSummary(1, 4, 2, {"macs": 100}, {"macs": 60}, {"macs": 0.6}, "amount", 0.5)
        >>> History([cut])
        History(1 cut, 4 filters, 60.0% of dense macs left)
        >>> print(History([cut]))
        epoch 1: cut 4 filters in 2 layers · macs 100 → 60 (60.0% of dense) · 0.5 s
    """

    def __repr__(self) -> str:
        left = (
            ", ".join(f"{share:.1%} of dense {name}" for name, share in self[-1].share.items())
            if self
            else ""
        )
        facts = [f"{len(self)} cut{'s' * (len(self) != 1)}"]
        facts += [counted(sum(cut.filters for cut in self), "filter"), f"{left} left"] if self else []
        return f"History({', '.join(facts)})"

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no cuts"

    def _repr_html_(self) -> str:
        resources = list(dict.fromkeys(name for cut in self for name in cut.share))
        heads = [
            "moment",
            *(f"{name} left" for name in resources),
            "filters",
            "layers",
            "change",
            "unrepaired",
            "seconds",
        ]
        return html_table(heads, [_html_row(cut, resources) for cut in self]) if self else "<p>no cuts</p>"


def _html_row(cut: CutSummary, resources: Sequence[str]) -> str:
    shares = [f"{cut.share[name]:.1%}" if name in cut.share else "" for name in resources]
    changes = ["" if value is None else f"{value:.2g}" for value in (cut.change, cut.change_unrepaired)]
    cells = [cut.moment, *shares, str(cut.filters), str(cut.layers), *changes, f"{cut.seconds:.1f}"]
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


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
    return (
        f"budget of {amounts(policy.budget)} not met: {reached} of the dense network remain; {advice}{ending}"
    )
