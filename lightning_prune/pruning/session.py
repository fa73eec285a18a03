"""The state of one network that is pruned step by step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.criteria.base import CriterionLike, Observer, as_criterion
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.trace import TraceError
from lightning_prune.pruning.step import BlockScores, Surgery, cut_
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.plan import Plan, Stop
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.prune import SurgeryError
from lightning_prune.surgery.rollback import snapshot
from lightning_prune.utils.example_inputs import Example, shapes_of
from lightning_prune.utils.modules import named_tensors
from lightning_prune.utils.passing import PassingFailure, on_all

__all__ = ["PruningSession"]


@dataclass
class PruningSession:
    """A network between two cuts: its present graph, its dense sizes, and the observer of the next cut's statistics.

    Attributes:
        target: the module that is pruned.
        example: the input that it is traced on.
        graph: its present graph.
        dense: its sizes before the first cut.
        compiled: whether it trains under ``torch.compile``, where forward hooks do not run.
        observer: collects statistics for the next cut; None if nothing is observed at the moment.
        last_plan: the plan of the last cut.
        exhausted: whether nothing more can be removed.
        owed: moment of a cut that failed for a reason that may pass and is to be made up for; None if there is none.
        surgery: carries out the plan of the next cut; None: :func:`~lightning_prune.prune_`. A pruning callback that
            repairs cuts sets it.
        block_scores: scores the residual blocks for the next cut, if the policy lets them vanish.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> example = ((torch.zeros(1, 1, 8, 8),), {})
        >>> graph = PruningPolicy({"macs": 0.5}).trace(net, example)
        >>> session = PruningSession(net, example, graph, DenseSizes.of(graph))
        >>> session.exhausted, session.observer
        (False, None)
    """

    target: nn.Module
    example: Example
    graph: ChannelGraph
    dense: DenseSizes
    compiled: bool = False
    observer: Observer | None = None
    last_plan: Plan | None = None
    exhausted: bool = False
    owed: int | None = None
    surgery: Surgery | None = None
    block_scores: BlockScores | None = None
    _within_batch: bool = False

    @property
    def stopped(self) -> Stop:
        """Reason for which the selection of the last cut ended."""
        if self.last_plan is not None:
            return self.last_plan.stopped
        return "limits" if self.exhausted else "budget"

    def observe(self, criterion: CriterionLike) -> bool:
        """Attach a new observer of the statistics that ``criterion`` needs; return False if it needs none."""
        self.stop_observing()
        observer = as_criterion(criterion).observer(self.graph, self.target)
        self.observer = None if observer is None else observer.attach()
        return self.observer is not None

    def needs_statistics(self, criterion: CriterionLike) -> bool:
        """Whether ``criterion`` scores by statistics that have to be observed."""
        return as_criterion(criterion).observer(self.graph, self.target) is not None

    def needs_steps(self, criterion: CriterionLike) -> bool:
        """Whether ``criterion`` observes training steps, which a separate pass over the data cannot replace."""
        observer = as_criterion(criterion).observer(self.graph, self.target)
        return observer is not None and observer.observes_steps

    def set_observing(self, active: bool) -> None:
        """Activate or pause the observer."""
        if self.observer is not None:
            self.observer.active = active

    def begin_batch(self) -> None:
        """Observe the training batch that begins."""
        self.set_observing(True)
        self._within_batch = self.observer is not None
        if (mark := getattr(self.observer, "mark", None)) is not None:
            mark()

    def end_batch(self) -> None:
        """Stop observing after a training batch."""
        self.set_observing(False)
        self._within_batch = False

    def drop_batch(self) -> None:
        """Forget what was observed of a batch that an exception has ended: it is repeated when training resumes."""
        if self._within_batch and (rewind := getattr(self.observer, "rewind", None)) is not None:
            rewind()
        self._within_batch = False

    def on_step(self, optimizer: Optimizer) -> None:
        """Show the observer the gradients with which ``optimizer`` is about to step."""
        if self.observer is not None:
            self.observer.on_step(p for group in optimizer.param_groups for p in group["params"])

    def stop_observing(self) -> None:
        """Detach the observer and discard its statistics."""
        if self.observer is not None:
            self.observer.detach()
        self.observer = None

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values for a checkpoint, from which :meth:`load_state` restores the session."""
        return {
            "example": shapes_of(self.example),
            "exhausted": self.exhausted,
            "owed": self.owed,
            "statistics": None if self.observer is None else self.observer.state(),
        }

    def load_state(self, state: Mapping[str, Any], criterion: CriterionLike) -> None:
        """Restore what :meth:`state` returned; the observer is paused until :meth:`set_observing`."""
        self.exhausted, self.owed = state["exhausted"], state.get("owed")  # old checkpoints owe nothing
        if state["statistics"] is not None and self.observe(criterion) and self.observer is not None:
            self.observer.load(state["statistics"])
            self.set_observing(False)

    def cut_(
        self,
        policy: PruningPolicy,
        criterion: CriterionLike,
        optimizers: Sequence[Optimizer] = (),
        now: int = 0,
    ) -> PruningRecord:
        """Remove the units of one cut with the observed statistics, and trace the smaller network.

        Args:
            policy: what may be removed, and how much in this cut.
            criterion: scores the units.
            optimizers: their state is cut along.
            now: the moment of the cut, from which one that fails in passing is owed.

        Returns:
            What was removed; an empty record, with a warning, if surgery refused every plan, or the cut failed for a
            reason that may pass.
        """
        statistics = {} if self.observer is None else self.observer.compute()
        self.stop_observing()
        restore, before = snapshot(self.target, [*named_tensors(self.target)], optimizers), self.graph
        try:
            plan, record = cut_(
                self.target,
                before,
                policy,
                criterion,
                statistics,
                self.dense,
                optimizers,
                self.surgery,
                self.block_scores,
            )
            graph = self.traced(policy) if record else before
        except PassingFailure as error:
            restore()
            self.postpone(now, error)
            return PruningRecord()
        except (SurgeryError, TraceError) as error:
            restore()  # a cut may be proven although the smaller network does not run
            self.exhausted = True
            warnings.warn(f"no more cuts, the network stays unchanged: {error}", stacklevel=2)
            return PruningRecord()
        self.last_plan, self.graph, self.owed = plan, graph, None
        self.exhausted = plan.stopped == "limits"
        return record

    def traced(self, policy: PruningPolicy) -> ChannelGraph:
        """Return the graph of the present network, in all processes.

        Raises:
            PassingFailure: the trace failed twice, for lack of memory and the like.
        """
        return on_all(lambda: policy.trace(self.target, self.example))

    def postpone(self, now: int, error: PassingFailure) -> None:
        """Remember, with a warning, that the cut of the moment ``now`` failed and is to be tried again."""
        self.owed = now
        warnings.warn(
            f"no cut this time, the network stays unchanged and the cut is tried again: {error}", stacklevel=3
        )
