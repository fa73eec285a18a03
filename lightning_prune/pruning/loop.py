"""A training loop of one's own as the loop around a cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.compensation.calibration import CompensationError, CompensationSettings
from lightning_prune.compensation.report import CompensationReport
from lightning_prune.pruning.block_scorer import BlockScorer
from lightning_prune.pruning.calibration import BatchSource, first_batches, independent_loader, seeded_batches
from lightning_prune.pruning.cut_repair import CutRepair, num_images
from lightning_prune.pruning.cut_summary import CutSummary
from lightning_prune.pruning.pruned_training import TrainingLoop
from lightning_prune.pruning.regular_cuts import RegularCuts
from lightning_prune.pruning.session import PruningSession
from lightning_prune.pruning.step import BlockScores
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.optimizer_state import CutParameter, check_buffers
from lightning_prune.surgery.sharding import whole_network
from lightning_prune.utils.batch_norm import average_norms_, recalibrate_
from lightning_prune.utils.distributed import from_first, is_first
from lightning_prune.utils.example_inputs import Example, inputs_of
from lightning_prune.utils.modules import declared, named_tensors, training_modes

__all__ = ["LoopSettings", "PlainLoop"]

DEFAULT_BATCHES = 16  # to estimate batch norms on


@dataclass(frozen=True)
class LoopSettings:
    """What follows a cut in a loop of one's own, and the batches for it.

    Attributes:
        batches: training batches; None: there are none.
        compensation: settings of the repair; None: cuts are not repaired.
        recalibrate_batches: number of batches to estimate norms on; None: 16 if the cut was not repaired.
        verbose: print a line per cut.
    """

    batches: BatchSource | None
    compensation: CompensationSettings | None
    recalibrate_batches: int | None
    verbose: bool

    def check(self, cuts: RegularCuts, session: PruningSession) -> None:
        """Raise ValueError if something needs batches, and there are none, or they can be read only once."""
        users = {
            "compensate": self.compensation is not None,
            "recalibrate_batches": bool(self.recalibrate_batches),
            "depth": cuts.policy.depth is not None,
            'statistics="pass", or a compiled network,': cuts.needs_pass(session)
            and session.needs_statistics(cuts.criterion),
        }
        for name, uses in users.items():
            if uses and self.batches is None:
                raise ValueError(
                    f"{name} needs batches=: a data loader of training data, or a function that returns one"
                )
        if self.batches is not None and not callable(self.batches):
            independent_loader(self.batches)

    @contextmanager
    def drawn(self, target: nn.Module, seed: int) -> Iterator[Iterator[Any]]:
        """Give training batches on the device of ``target``."""
        source: BatchSource = [] if self.batches is None else self.batches
        with seeded_batches(source, seed, next(target.parameters()).device) as batches:
            yield batches

    def images(self, target: nn.Module, number: int, seed: int) -> list[Any]:
        """Return training batches with ``number`` images in all, on the device of ``target``."""
        with self.drawn(target, seed) as batches:
            return first_batches(islice(batches, number), target, number)

    def inputs(self, batches: Iterator[Any], target: nn.Module) -> Iterator[Example]:
        """Yield what the forward of ``target`` takes of each batch."""
        return (example for batch in batches if (example := inputs_of(batch, target.forward)) is not None)


@contextmanager
def plain_forwards(target: nn.Module) -> Iterator[None]:
    """Run forwards in the precision of the weights, and compiled code eagerly, because it skips hooks."""
    device = next(target.parameters()).device.type
    with torch.autocast(device, enabled=False), torch.compiler.set_stance("force_eager"):
        yield


class PlainLoop(TrainingLoop):
    """What a cut needs of a loop that calls ``Pruner.step``.

    Args:
        settings: batches, and what follows a cut.
        cuts: the moments of cuts, and what each removes.
        now: the moment of the cut.
        copies: copies of the network.
        optimizers: those that train the network.
        on_cut: functions to call after the cut.
    """

    def __init__(
        self,
        settings: LoopSettings,
        cuts: RegularCuts,
        now: int,
        copies: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        on_cut: Sequence[Callable[[PruningRecord], Any]],
    ) -> None:
        self.settings, self.cuts, self.now = settings, cuts, now
        self.copies, self.optimizers, self.on_cut = copies, optimizers, on_cut
        self._session: PruningSession | None = None
        self._record = PruningRecord()

    def whole_network(self, session: PruningSession) -> AbstractContextManager[None]:
        """Gather a network that ``fully_shard`` distributes, and the state of its optimizers."""
        return whole_network(session.target, self.optimizers)

    def begin_cut(self) -> tuple[Sequence[nn.Module], Sequence[Optimizer]]:
        """Check that the state of all optimizers can be cut."""
        for optimizer in self.optimizers:
            check_buffers(optimizer)
        return self.copies, self.optimizers

    def repair_of_cut(
        self, session: PruningSession, copies: Sequence[nn.Module], number: int
    ) -> CutRepair | None:
        """Return a repair with images of the training batches."""
        self._session, settings = session, self.settings.compensation
        if settings is None:
            return None
        target = session.target
        repair = CutRepair([target, *copies], [], settings, lambda: plain_forwards(target))

        def draw() -> None:
            with plain_forwards(target):
                images = num_images(target, session.example, repair.settings)
            repair.batches = self.settings.images(target, images, number)

        try:
            from_first(draw)
        except CompensationError as error:
            repair.failure = str(error)
        return repair

    def block_scores(self, number: int) -> BlockScores | None:
        """Return what scores residual blocks on images of the training batches; None if none may vanish."""
        depth = self.cuts.policy.depth
        if depth is None or self._session is None:
            return None
        target = self._session.target
        images = partial(self.settings.images, seed=number)
        return BlockScorer(depth, images, context=lambda: plain_forwards(target))

    def remove_units_(
        self, session: PruningSession, copies: Sequence[nn.Module], optimizers: Sequence[Optimizer]
    ) -> PruningRecord:
        """Make the cut that is due, after a pass over the batches if statistics need one."""
        return self.cuts.cut_(session, self.now, optimizers, lambda: self._run_batches(session))

    def cut_copies_(self, record: PruningRecord) -> Mapping[str, CutParameter]:
        """Cut the copies of the network by the same record."""
        self._record, cut = record, dict[str, CutParameter]()
        for number, network in enumerate(self.copies):
            tensors = named_tensors(network)
            shapes = {name: tensors[name].shape for name in record.kept}
            record.apply_(network, verify=False)
            for name, dims in record.kept.items():
                cut[f"copy {number}: {name}"] = CutParameter(tensors[name], shapes[name], dims)
        return cut

    def repair_(self, repair: CutRepair) -> CompensationReport:
        """Repair network and copies; warn where that is impossible."""
        report = super().repair_(repair)
        if repair.failure:
            warnings.warn(
                f"the cut is not repaired: {repair.failure}. Set compensate=False, or give batches that begin with "
                "what the forward takes",
                stacklevel=6,
            )
        return report

    def adapt_(self, record: PruningRecord, copies: Sequence[nn.Module], keeps_norms: bool) -> None:
        """Call ``on_after_prune`` of the network, where it is defined, and estimate norms anew."""
        assert self._session is not None
        target = self._session.target
        if (hook := declared(target, "on_after_prune")) is not None:
            hook(record)
        number = self.settings.recalibrate_batches
        number = (0 if keeps_norms else DEFAULT_BATCHES) if number is None else number
        if number and self.settings.batches is not None:
            self._recalibrate_norms_(target, [target, *copies], number)

    def end_cut(self, summary: CutSummary) -> None:
        """Call the functions for cuts, and print a line."""
        assert self._session is not None
        for function in self.on_cut:
            function(self._record)
        plan = self._session.last_plan
        if self.settings.verbose and is_first():
            print(f"{summary} · {plan.ending}" if self._session.exhausted and plan else summary)

    def _recalibrate_norms_(self, target: nn.Module, networks: Sequence[nn.Module], number: int) -> None:
        """Estimate norms anew; where that was not requested and is impossible, warn, and leave them as they are."""
        try:
            for network in networks:
                with plain_forwards(target), self.settings.drawn(target, self.now) as batches:
                    used = recalibrate_(network, islice(self.settings.inputs(batches, target), number))
                average_norms_(network, used)
        except Exception as error:  # the network's own code may raise anything
            if self.settings.recalibrate_batches is not None:
                raise
            warnings.warn(
                f"batch norms were not estimated anew after the cut, as the network cannot run on the batches "
                f"({type(error).__name__}: {error}); set recalibrate_batches=0, or give batches that begin with its "
                "input",
                stacklevel=6,
            )

    def _run_batches(self, session: PruningSession) -> None:
        target = session.target
        with (
            torch.no_grad(),
            training_modes(target, lambda module: False),
            plain_forwards(target),
            self.settings.drawn(target, self.now) as batches,
        ):
            for args, kwargs in self.settings.inputs(batches, target):
                target(*args, **kwargs)
