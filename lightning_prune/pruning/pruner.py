"""``Pruner``: prune a network in a training loop of one's own, or in a trainer other than Lightning's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Unpack, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.compensation.calibration import CompensationSettings
from lightning_prune.criteria.base import CriterionLike
from lightning_prune.criteria.ipad import default_criterion
from lightning_prune.pruning.calibration import BatchSource
from lightning_prune.pruning.cut_repair import compensation_settings
from lightning_prune.pruning.cut_summary import CutSummary, History, size_metrics
from lightning_prune.pruning.description import description, html_description
from lightning_prune.pruning.loop import LoopSettings, PlainLoop
from lightning_prune.pruning.pruned_training import PrunedTraining
from lightning_prune.pruning.pruner_checks import (
    check_copies,
    check_moment,
    check_not_sharded,
    check_observer,
    check_one_device,
    check_unchanged,
    unwrapped,
)
from lightning_prune.pruning.pruner_state import VERSION, check_state, resize_
from lightning_prune.pruning.regular_cuts import RegularCuts, StatisticsMode, retry_is_due, with_amount
from lightning_prune.pruning.schedules import timing_of
from lightning_prune.pruning.session import PruningSession
from lightning_prune.pruning.step_watch import StepWatch, as_optimizers, check_optimizers
from lightning_prune.selection.depth_settings import DepthSettings
from lightning_prune.selection.policy import PolicyArguments, PruningPolicy, with_depth
from lightning_prune.serialization.carried_record import carried_record
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.sharding import check_sharding
from lightning_prune.utils.arguments import check_choice
from lightning_prune.utils.example_inputs import as_example, on_device
from lightning_prune.utils.modules import has_compiled_parts, named_shapes

__all__ = ["Pruner"]


class Pruner:
    """Remove filters of a network at chosen epochs or steps of a training loop that is not Lightning's.

    The loop runs its forwards within :meth:`observe`, and calls :meth:`step` after each epoch, or after each
    optimizer step. There, when a cut is due, units are scored, removed and proven, the state of the optimizers is cut
    along, and the network is repaired: all as :class:`~lightning_prune.FilterPruningCallback` does it, by the same
    code. The network stays the same object, with the same ``Parameter`` objects.

    Args:
        model: the network that is trained, on its device, out of any wrapper for several devices.
        example: its input: a tensor, a tuple, or a dictionary of named ones.
        budget: what must remain: a resource or several -> a share of the dense network in (0, 1], or an absolute
            amount above 1; or a whole :class:`~lightning_prune.PruningPolicy`.
        criterion: scores the units; by default ``IPAD(omega=0.25, terms="energy")``.
        amount: what is removed in one cut, as in the budget; by default a tenth of the dense network.
        schedule: number of the cut -> share of what has to be removed that is removed after it, in place of
            ``amount``: :class:`~lightning_prune.Linear`, :class:`~lightning_prune.Cubic` or a function.
        every_n_epochs: epochs between cuts.
        start_epoch: the first cut comes at the end of this epoch, counted from 0.
        every_n_steps: optimizer steps between cuts, instead of epochs.
        start_step: the first of them comes after this many steps; by default ``every_n_steps``.
        batches: training batches that hold what the forward takes (a data loader, or a function that returns an
            iterator), for the repair, for the statistics of batch norms, and for ``statistics="pass"``. Read in cuts
            only, without an effect on random states.
        compensate: repair each cut on images of ``batches``, see :class:`~lightning_prune.FilterPruningCallback`;
            None: if there are batches.
        depth: whether residual blocks may vanish as a whole, or :class:`~lightning_prune.DepthSettings`; they are
            scored on images of ``batches``, see :class:`~lightning_prune.FilterPruningCallback`.
        recalibrate_batches: after a cut, estimate the running statistics of batch norms on this many batches; None:
            16 if there are batches and the cut was not repaired, else 0.
        statistics: collected within :meth:`observe` during the ``"epoch"`` that ends with a cut (or the steps between
            two cuts), or in a ``"pass"`` of its own over ``batches``, in eval mode. Under ``torch.compile``, where
            hooks do not run, it is always a pass.
        copies: copies of the network that the loop keeps, such as a moving average, which are cut along.
        on_cut: functions of the record of a cut, called after it, for everything else that depends on sizes.
        verbose: print one line per cut.
        policy: ``limits``, ``exclude``, ``channel_multiple``, ``resources``: see
            :class:`~lightning_prune.PruningPolicy`.

    Attributes:
        model: the network.
        copies: see above; may be changed between cuts.
        on_cut: list of the functions; may be changed between cuts.

    Raises:
        ValueError: an argument is out of range, the network is on several devices or wrapped, or the budget cannot
            be met. Nothing was changed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> images, optimizer = torch.rand(4, 1, 8, 8), torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        >>> pruner = Pruner(net, images[:1], {"macs": 0.5}, amount={"macs": 0.25}, verbose=False)
        >>> for epoch in range(4):
        ...     optimizer.zero_grad()
        ...     with pruner.observe():
        ...         loss = net(images).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     summary = pruner.step(optimizer, epoch)
        >>> net[0].out_channels, pruner.finished
        (4, True)
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        budget: Mapping[str, float] | PruningPolicy,
        *,
        criterion: CriterionLike | None = None,
        amount: Mapping[str, float] | None = None,
        schedule: Callable[[int], float] | None = None,
        every_n_epochs: int = 1,
        start_epoch: int = 1,
        every_n_steps: int | None = None,
        start_step: int | None = None,
        batches: BatchSource | None = None,
        compensate: bool | CompensationSettings | None = None,
        depth: bool | DepthSettings | None = None,
        recalibrate_batches: int | None = None,
        statistics: StatisticsMode = "epoch",
        copies: Sequence[nn.Module] = (),
        on_cut: Sequence[Callable[[PruningRecord], Any]] = (),
        verbose: bool = True,
        **policy: Unpack[PolicyArguments],
    ) -> None:
        timing = timing_of(every_n_epochs, start_epoch, every_n_steps, start_step, schedule)
        check_choice("statistics", statistics, get_args(StatisticsMode))
        whole_policy = with_amount(PruningPolicy.of(budget, **policy).with_budget(), amount, schedule)
        whole_policy = with_depth(whole_policy, depth)
        self._cuts = RegularCuts(whole_policy, timing, criterion or default_criterion(), statistics)
        settings = compensation_settings(batches is not None if compensate is None else compensate)
        self._settings = LoopSettings(batches, settings, recalibrate_batches, verbose)
        self.model, self.copies = unwrapped(model), list(copies)
        check_not_sharded(self.model, "make the Pruner")
        self.on_cut = [on_cut] if callable(on_cut) else list(on_cut)
        self._example = on_device(as_example(example), check_one_device(self.model))
        self._compiled = model is not self.model or has_compiled_parts(self.model)
        self._state = PrunedTraining()
        self._state.record = carried_record(self.model) or None
        check_copies(self.model, self.copies)
        self._start()
        self._settings.check(self._cuts, self._session)
        self._watch = StepWatch(self.model, self._on_step)
        self._observing, self._forwards, self._warnings = False, 0, set[str]()

    def __repr__(self) -> str:
        return description(type(self).__name__, self.policy, self.history, self.within_budget)

    def _repr_html_(self) -> str:
        return html_description(repr(self), self.history)

    @property
    def policy(self) -> PruningPolicy:
        """Budget, limits and exclusions."""
        return self._cuts.policy

    @property
    def criterion(self) -> CriterionLike:
        """The criterion that scores the units."""
        return self._cuts.criterion

    @property
    def counts_steps(self) -> bool:
        """Whether :meth:`step` counts optimizer steps, and not epochs."""
        return self._cuts.timing.by_steps

    @property
    def record(self) -> PruningRecord | None:
        """The record of all filters removed so far, compared with the dense network; None before the first cut."""
        return self._state.record

    @property
    def history(self) -> History:
        """A summary of every cut."""
        return self._state.history

    @property
    def within_budget(self) -> bool:
        """Whether the present network meets the budget."""
        return self.policy.is_met(self._session.graph, self._session.dense)

    @property
    def finished(self) -> bool:
        """Whether there will be no more cuts: the budget is met, or nothing is left to remove."""
        return self._cuts.is_finished(self._session)

    @property
    def metrics(self) -> dict[str, float]:
        """Costs of the present network and their shares of the dense ones, to log."""
        return size_metrics(self._session.graph, self._session.dense)

    @property
    def _session(self) -> PruningSession:
        assert self._state.session is not None
        return self._state.session

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Gather statistics for the next cut from the training forwards within this context.

        It may also contain backward and optimizer step. Criteria that use gradients read them when an optimizer
        steps, wherever that is: of a gradient scaler, call ``unscale_`` before its ``step``. What was gathered in a
        context that an exception ends is forgotten.

        Raises:
            RuntimeError: the context is entered within itself, or the network runs as copies on several devices.
        """
        if self._observing:
            raise RuntimeError(
                "observe() was entered within observe(): enter it once for each training batch"
            )
        session, self._observing = self._session, True
        if session.observer is None and self._is_awaited() and session.observe(self._cuts.criterion):
            check_observer(self.model, session)
        session.begin_batch()
        before, handle = self._forwards, self.model.register_forward_pre_hook(_hook(self))
        try:
            yield
            self._warn_of_no_forward(before)
        except BaseException:
            session.drop_batch()
            self._forwards = before
            raise
        finally:
            handle.remove()
            session.end_batch()
            self._observing = False

    def step(self, optimizers: Optimizer | Iterable[Optimizer] | None, now: int) -> CutSummary | None:
        """Make a cut if it is due, after an epoch or an optimizer step, before the next forward.

        Args:
            optimizers: all that train the network: their state is cut along. None: the network is not trained.
            now: the epoch that has ended, counted from 0; with ``every_n_steps`` the number of optimizer steps made.

        Returns:
            The summary of the cut; None if there was none.

        Raises:
            ValueError: ``now`` is below that of the last call; or, for a cut that is due, nothing was observed of
                what its criterion needs, an optimizer does not know the network or another one trains it, or the
                loop has rebuilt the network. Nothing was changed.
        """
        given, last = as_optimizers(optimizers), self._state.last_handled
        now = check_moment(now, last, self._cuts.timing.unit)
        if now == last:
            self._warn_of_repetition(now)
            return None
        is_due = self._cuts.is_due(now, last) or retry_is_due(self._session, self._cuts.timing, now)
        summary = self._cut(given, now) if is_due and not self.finished else None
        self._state.last_handled = now
        if not self.counts_steps or self.finished:
            self._session.stop_observing()  # statistics are those of the epoch that a cut ends
            self._forwards = 0
        self._watch.active = not self.finished
        return summary

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as plain values and tensors: record, history, statistics gathered so far."""
        return {"version": VERSION, **self._state.state(self._cuts.timing), "session": self._session.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, and give the network and its copies the sizes that they had then.

        Load the weights of the network, and the state of its optimizers, after this.

        Raises:
            ValueError: it is no state of a Pruner, or one of another network. Nothing was changed.
        """
        check_state(state)
        check_not_sharded(self.model, "load the state of the Pruner")
        record = None if state["record"] is None else PruningRecord.from_dict(state["record"])
        resize_([self.model, *check_copies(self.model, self.copies)], record or PruningRecord())
        self._session.stop_observing()
        self._state.load(state, self._cuts.timing)
        self._start()
        self._session.load_state(state["session"], self._cuts.criterion)
        self._forwards = int(self._session.observer is not None)
        self._watch.forget()
        self._watch.active = not self.finished

    def close(self) -> None:
        """Remove all hooks; the network can be used on. Otherwise they go with this object."""
        self._session.stop_observing()
        self._watch.close()

    def _start(self) -> None:
        """Trace the present network."""
        self._state.start(self.policy, self.model, self._example, self._compiled)
        self._shapes = named_shapes(self.model)

    def _cut(self, optimizers: Sequence[Optimizer], now: int) -> CutSummary | None:
        """Check what the loop has done, and make a cut."""
        check_one_device(self.model)
        check_sharding(self.model)
        check_unchanged(self.model, self._shapes)
        check_optimizers(self.model, optimizers, self._watch.stepped)
        copies = check_copies(self.model, self.copies)
        self._check_observed()
        loop = PlainLoop(self._settings, self._cuts, now, copies, optimizers, self.on_cut)
        epoch, step = (None, now) if self.counts_steps else (now, None)
        summary = self._state.cut_(loop, now, epoch, step)
        self._shapes, self._forwards = named_shapes(self.model), 0
        self._watch.forget()
        return summary

    def _is_awaited(self) -> bool:
        """Whether the batch that begins is to be observed."""
        if self.finished:
            return False
        last = self._state.last_handled
        # Before the first call of `step` nobody knows whether the loop counts epochs from 0 or from 1.
        moments = (max(last, 0),) if self.counts_steps else (last + 1,) if last >= 0 else (0, 1)
        return any(self._cuts.criterion_to_observe(self._session, now) is not None for now in moments)

    def _check_observed(self) -> None:
        """Raise ValueError if the criterion needs statistics that were not gathered."""
        session, criterion = self._session, self._cuts.criterion
        if self._cuts.needs_pass(session) or (session.observer is not None and self._forwards):
            return
        if session.observer is not None or session.needs_statistics(criterion):
            raise ValueError(
                f"{type(criterion).__name__} needs statistics, and no forward of the network was observed since the "
                "last cut: run the training forwards within `with pruner.observe():`, of the module that the Pruner "
                'was given; or set statistics="pass" with batches; or take a criterion of weights alone, such as '
                "L2(). Nothing was cut"
            )

    def _on_step(self, optimizer: Optimizer) -> None:
        """Show the gradients to a criterion that uses them."""
        session = self._session
        if session.observer is None or not session.observer.observes_steps:
            return
        if getattr(optimizer, "grad_scale", None) is not None:
            self._warn_once(
                "gradients are scaled: call scaler.unscale_(optimizer) before scaler.step(optimizer)", 5
            )
        session.set_observing(True)
        session.on_step(optimizer)
        session.set_observing(self._observing)

    def _warn_of_no_forward(self, before: int) -> None:
        if self._forwards == before and self._session.observer is not None and torch.is_grad_enabled():
            self._warn_once(
                "no forward of the network ran within observe(): the training loop runs another module, perhaps a "
                "copy or a compiled one. Make the Pruner of the module that is trained",
                stacklevel=5,
            )

    def _warn_of_repetition(self, now: int) -> None:
        self._warn_once(
            f"step() was called twice for {now} {self._cuts.timing.unit}, and the second call does nothing: call it "
            "once after each epoch, or each optimizer step",
            stacklevel=4,
        )

    def _warn_once(self, message: str, stacklevel: int) -> None:
        if message[:40] not in self._warnings:
            self._warnings.add(message[:40])  # the rest may name a moment
            warnings.warn(message, stacklevel=stacklevel)


def _hook(pruner: Pruner) -> Callable[[nn.Module, Any], None]:
    """Return a forward hook that counts forwards; copies of the network share it, and not a copy of the Pruner."""

    def count(module: nn.Module, args: Any) -> None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "the network runs as copies on several devices (DataParallel), whose activations cannot be put "
                "together: train it on one device, or in several processes with DistributedDataParallel"
            )
        pruner._forwards += module is pruner.model

    return count
