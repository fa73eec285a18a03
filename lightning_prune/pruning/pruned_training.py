"""The state of a training in which a network is pruned, and the procedure of one cut, for any training loop."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.compensation.report import CompensationReport
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.pruning.cut_repair import CutRepair
from lightning_prune.pruning.cut_summary import CutSummary, History
from lightning_prune.pruning.schedules import Timing
from lightning_prune.pruning.session import PruningSession
from lightning_prune.pruning.step import BlockScores
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.serialization.carried_record import carried_record, regrow_
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.serialization.saving import has_shapes_of
from lightning_prune.surgery.optimizer_state import CutParameter, cut_state_
from lightning_prune.utils.distributed import warn_first
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.passing import on_all

__all__ = ["PrunedTraining", "TrainingLoop", "check_record"]


class TrainingLoop(ABC):
    """What the procedure of a cut asks of the training loop around it, in the order in which it asks.

    Lightning's trainer is one such loop, a loop that calls :meth:`Pruner.step <lightning_prune.Pruner.step>` another.
    """

    def whole_network(self, session: PruningSession) -> AbstractContextManager[None]:
        """Return a context in which the network is in one piece in every process."""
        return nullcontext()

    def begin_cut(self) -> tuple[Sequence[nn.Module], Sequence[Optimizer]]:
        """Check that a cut is possible.

        Returns:
            Copies of the network, which are cut after it, and the optimizers whose state is cut along.
        """
        return (), ()

    def repair_of_cut(
        self, session: PruningSession, copies: Sequence[nn.Module], number: int
    ) -> CutRepair | None:
        """Return the repair of cut ``number``, with its images; None if cuts are not repaired."""
        return None

    def block_scores(self, number: int) -> BlockScores | None:
        """Return what scores residual blocks for cut ``number``; None if it has no images for that."""
        return None

    @abstractmethod
    def remove_units_(
        self, session: PruningSession, copies: Sequence[nn.Module], optimizers: Sequence[Optimizer]
    ) -> PruningRecord:
        """Cut the network, and return what was removed; empty if nothing was."""

    def cut_copies_(self, record: PruningRecord) -> Mapping[str, CutParameter]:
        """Cut all copies likewise; return a name -> each parameter of theirs that was cut, for the optimizers."""
        return {}

    def after_units_(self, session: PruningSession) -> None:  # noqa: B027 - most loops have nothing to do
        """Adapt the smaller network and its copies before they are repaired."""

    def repair_(self, repair: CutRepair) -> CompensationReport:
        """Repair network and copies; return the report of the network."""
        reports = repair.repair_()
        return reports[0] if reports else CompensationReport(False, repair.failure)

    @abstractmethod
    def adapt_(self, record: PruningRecord, copies: Sequence[nn.Module], keeps_norms: bool) -> None:
        """Adapt all that depends on sizes, and norms unless ``keeps_norms``: those of a repaired network fit."""

    @abstractmethod
    def end_cut(self, summary: CutSummary) -> None:
        """Report the cut."""


class PrunedTraining:
    """The state of a training in which a network is pruned, and the procedure of one cut.

    Attributes:
        record: what was removed so far, relative to the dense network; None before the first cut.
        history: a summary of every cut.
        dense: sizes of the dense network; None before the first trace.
        session: the network between two cuts; None while there is no training.
        last_handled: the last epoch, or optimizer step, whose end was dealt with; -1 before the first.
    """

    def __init__(self) -> None:
        self.record: PruningRecord | None = None
        self.history = History()
        self.dense: DenseSizes | None = None
        self.session: PruningSession | None = None
        self.last_handled = -1

    def start(
        self,
        policy: PruningPolicy,
        target: nn.Module,
        example: Example,
        compiled: bool,
        copy_of: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    ) -> PruningSession:
        """Trace the network, check what can be checked before training, and return the session.

        Args:
            policy: what must remain and what may be removed.
            target: the network to prune.
            example: its input, on its device.
            compiled: whether it trains under ``torch.compile``.
            copy_of: returns a copy of the network.

        Raises:
            ValueError: the budget cannot be met, or the network is not the one that was pruned.
        """
        check_record(target, self.record)
        graph = on_all(lambda: policy.trace(target, example))
        if self.record is None:
            self.dense = checked_dense_sizes(policy, graph, target)
        elif self.dense is None and carried_record(target):
            self.dense = _sizes_before_pruning(policy, copy_of(target), example)
        shapes = self.record.shapes if self.record else {}
        dense = (self.dense or DenseSizes.of(graph)).completed(graph, shapes)
        self.session = PruningSession(target, example, graph, dense, compiled)
        return self.session

    def cut_(self, loop: TrainingLoop, now: int, epoch: int | None, step: int | None) -> CutSummary | None:
        """Make one cut, repair it, and adapt training to the smaller network.

        Args:
            loop: the training around it.
            now: the epoch, or the number of optimizer steps.
            epoch: at whose end, or within which, the cut is made; None: only steps are counted.
            step: number of optimizer steps before it, if it is made within an epoch.

        Returns:
            The summary of the cut; None if nothing was removed.
        """
        assert self.session is not None
        with loop.whole_network(self.session):
            summary = self._cut_whole_(self.session, loop, now, epoch, step)
        if summary is not None:
            loop.end_cut(summary)
        return summary

    def _cut_whole_(
        self, session: PruningSession, loop: TrainingLoop, now: int, epoch: int | None, step: int | None
    ) -> CutSummary | None:
        """Make the cut, all but its end."""
        start, graph = time.perf_counter(), session.graph
        copies, optimizers = loop.begin_cut()
        repair = loop.repair_of_cut(session, copies, len(self.history))
        session.surgery = repair.prune_ if repair else None
        session.block_scores = loop.block_scores(len(self.history))
        record = loop.remove_units_(session, copies, optimizers)
        session.surgery = session.block_scores = None
        if not record:
            return None
        self.last_handled = now  # from here on a checkpoint holds this cut, whatever fails in what follows
        self.record = record if self.record is None else self.record.then(record)
        cut_parameters = loop.cut_copies_(record)
        summary = CutSummary.between(graph, session.graph, session.dense, session.stopped, epoch, 0.0, step)
        self.history.append(replace(summary, seconds=time.perf_counter() - start))
        loop.after_units_(session)
        for optimizer in optimizers:
            cut_state_(optimizer, cut_parameters)
        report = loop.repair_(repair) if repair else None
        # Images that the network cannot run on serve no estimate of norms either.
        keeps_norms = report is not None and repair is not None and (report.accepted or bool(repair.failure))
        loop.adapt_(record, copies, keeps_norms)
        summary = replace(summary, seconds=time.perf_counter() - start)
        self.history[-1] = summary = summary.with_repair(report) if report else summary
        return summary

    def state(self, timing: Timing) -> dict[str, Any]:
        """Return record, dense sizes, history and the last moment, as plain values."""
        return {
            "record": self.record.to_dict() if self.record else None,
            "dense": self.dense.to_dict() if self.dense else None,
            "history": [asdict(cut) for cut in self.history],
            "ended": {"unit": timing.unit, "last": self.last_handled},
        }

    def load(self, state: Mapping[str, Any], timing: Timing) -> None:
        """Restore what :meth:`state` returned; moments in another unit than that of ``timing`` are forgotten."""
        record, dense = state["record"], state["dense"]
        self.record = PruningRecord.from_dict(record) if record else None
        if dense:  # a state from before the first trace has none
            self.dense = DenseSizes.from_dict(dense)
        self.history = History(CutSummary(**cut) for cut in state["history"])
        ended = state["ended"]
        self.last_handled = ended["last"] if ended["unit"] == timing.unit else -1


def check_record(target: nn.Module, record: PruningRecord | None) -> None:
    """Raise ValueError if ``target`` was not cut to a record that is to be continued."""
    if record is None:
        return
    carried = carried_record(target)
    is_other = bool(carried) and (
        carried.vanished.keys() != record.vanished.keys()
        or any(carried.kept.get(name) != dims for name, dims in record.kept.items())
    )
    if is_other or not has_shapes_of(target, record):
        raise ValueError(
            "this callback has pruned a network of other sizes; give a fresh network a new callback, or resume from "
            "the checkpoint of that run"
        )


def checked_dense_sizes(policy: PruningPolicy, graph: ChannelGraph, target: nn.Module) -> DenseSizes:
    """Return the sizes of the dense network; warn if limits may stop pruning before its budget is met.

    Raises:
        ValueError: the policy does not fit the network.
    """
    policy.check(graph)
    prediction = policy.predict(graph, target)
    if not prediction.reached:
        warn_first(f"the limits may stop pruning above the budget: {prediction}", stacklevel=4)
    return DenseSizes.of(graph)


def _sizes_before_pruning(policy: PruningPolicy, pruned: nn.Module, example: Example) -> DenseSizes:
    """Return the sizes of the dense network of which ``pruned``, a copy, is what earlier prunings have left."""
    regrow_(pruned)
    return checked_dense_sizes(policy, policy.trace(pruned, example), pruned)
