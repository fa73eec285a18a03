"""NEW."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.criteria.activation_deviation import ActivationDeviation
from lightning_prune.criteria.base import Criterion, Gatherer
from lightning_prune.criteria.collector import Collector
from lightning_prune.criteria.gradients import Gradients
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.pruning.step import cut_
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.prune import SurgeryError
from lightning_prune.utils.example_inputs import Example, shapes_of


def gathers(criterion: Criterion) -> Callable[..., Gatherer] | None:
    """How the criterion gathers for itself, while training, what hooks on activations do not see."""
    return getattr(criterion, "gather", None)


@dataclass
class PruningSession:
    """A network on its way from dense to small: what is known of it between two cuts.

    Attributes:
        target: the module that is pruned.
        example: what it is traced on.
        graph: its graph as it is now.
        dense: its sizes before the first cut.
        compiled: hooks see nothing of it while it trains.
        collector: what gathers statistics at the moment.
        last: the last plan.
        exhausted: there is nothing more to remove.
    """

    target: nn.Module
    example: Example
    graph: ChannelGraph
    dense: DenseSizes
    compiled: bool = False
    collector: Gatherer | None = None
    last: Plan | None = None
    exhausted: bool = False

    def collect(self, criterion: Criterion) -> bool:
        """Start to gather what the criterion wants to know; False if that is nothing."""
        statistic, gather = getattr(criterion, "statistic", ActivationDeviation), gathers(criterion)
        self.forget()
        if gather is not None:
            self.collector = gather(self.graph, self.target)
        elif statistic is not None:
            self.collector = Collector(self.graph, self.target, statistic).attach()
        return self.collector is not None

    def stepping(self, optimizer: Optimizer) -> None:
        """Look at the gradients with which ``optimizer`` is about to step, if the criterion wants to know them."""
        if isinstance(self.collector, Gradients):
            self.collector.update(p for group in optimizer.param_groups for p in group["params"])

    def watch(self, active: bool) -> None:
        """Let the forwards that follow count, or not."""
        if self.collector is not None:
            self.collector.active = active

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to hold so that :meth:`take_up` goes on from here: tensors, plain values."""
        statistics = None if self.collector is None else self.collector.state()
        return {
            "example": shapes_of(self.example),
            "exhausted": self.exhausted,
            "statistics": statistics,
        }

    def take_up(self, state: Mapping[str, Any], criterion: Criterion) -> None:
        """Go on from what :meth:`state` gave; forwards do not count until :meth:`watch` says so."""
        self.exhausted = state["exhausted"]
        if state["statistics"] is not None and self.collect(criterion) and self.collector is not None:
            self.collector.load(state["statistics"])
            self.watch(False)

    def forget(self) -> None:
        """Remove the hooks, and what they gathered."""
        if self.collector is not None:
            self.collector.detach()
        self.collector = None

    def cut_(
        self,
        rules: PruningPolicy,
        criterion: Criterion,
        optimizers: Sequence[Optimizer] = (),
    ) -> PruningRecord:
        """:func:`cut_` with what was gathered, and trace the smaller network. If surgery refuses: warn."""
        statistics = {} if self.collector is None else self.collector.compute()
        self.forget()
        try:
            self.last, record = cut_(
                self.target, self.graph, rules, criterion, statistics, self.dense, optimizers
            )
        except SurgeryError as error:
            self.exhausted = True
            warnings.warn(f"no more cuts, the network stays as it is: {error}", stacklevel=2)
            return PruningRecord()
        self.exhausted = self.last.stopped == "limits"
        if record:
            self.graph = rules.traced(self.target, self.example)
        return record
