"""Prune to the budget at the end of one epoch, by a NetAdapt search in rounds of competing candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.callbacks.candidate_training import (
    detached_copy,
    rehearse_candidate,
    training_from_trainer,
    with_default_device,
)
from lightning_prune.callbacks.held_out_data import HeldOutSource, check_disjoint
from lightning_prune.callbacks.methods.base import PruningMethod
from lightning_prune.compensation.calibration import CompensationSettings
from lightning_prune.netadapt.candidate import CALIBRATION_BATCHES
from lightning_prune.netadapt.repair import SearchRepair
from lightning_prune.netadapt.rounds import Round, Rounds, SearchResult, rounds_table, target_share
from lightning_prune.netadapt.run import check_search
from lightning_prune.netadapt.searcher import Searcher
from lightning_prune.netadapt.workers import Workers
from lightning_prune.pruning.schedules import Timing
from lightning_prune.pruning.session import PruningSession
from lightning_prune.pruning.training import Training
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.trainer.batches import IndexedBatch, held_out_batches, train_batches
from lightning_prune.trainer.lightning_internals import set_training_source, training_source
from lightning_prune.trainer.training_state import is_last_epoch, print_line
from lightning_prune.utils.hashing import batch_digest
from lightning_prune.utils.passing import PassingFailure, on_all
from lightning_prune.utils.seeding import seeded

__all__ = ["NetAdapt"]


class NetAdapt(PruningMethod):
    """Runs all rounds of a search at once, and gives the training network the last winner's cut and weights.

    Args:
        policy: the budget, in one resource, and what may be removed.
        start_epoch, rounds, workers, held_out, metric, folder, verbose, compensate: see
            :class:`~lightning_prune.NetAdaptCallback`.
        higher_is_better: whether a higher metric is better.
        submodule: qualified name of the part that is pruned.

    Attributes:
        rounds_done: see :class:`~lightning_prune.NetAdaptCallback`.
    """

    def __init__(
        self,
        policy: PruningPolicy,
        start_epoch: int,
        rounds: Rounds,
        workers: Workers,
        held_out: Any,
        metric: str,
        higher_is_better: bool,
        submodule: str | None,
        folder: str | Path | None,
        verbose: bool,
        compensate: bool | CompensationSettings,
    ) -> None:
        super().__init__(policy, Timing(start=start_epoch), rounds.criterion)
        self.rounds, self.workers, self.held_out = rounds, workers, held_out
        self.metric, self.higher_is_better = metric, higher_is_better
        self.submodule, self.folder, self.verbose = submodule, folder, verbose
        self.compensate = compensate
        self.rounds_done: list[Round] = []
        self._source: HeldOutSource | None = None
        self._optimizer_state: Any = None  # the last winner's, until the trainer's optimizer takes it over

    def criterion_to_observe(self, trainer: L.Trainer, session: PruningSession) -> None:
        """Observe nothing: each round collects statistics for its criterion itself."""

    def is_due(self, trainer: L.Trainer, session: PruningSession, now: int, last: int) -> bool:
        """Return True once, at the first epoch from ``start_epoch`` on."""
        return now >= self.timing.start and not self.rounds_done and self.may_cut(trainer, session)

    def cut_(
        self,
        trainer: L.Trainer,
        session: PruningSession,
        now: int,
        copies: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
    ) -> PruningRecord:
        """Run the search on a copy, and take over its cut, weights and optimizer state."""
        network = detached_copy(session.target)
        try:
            result = self._search(trainer, session, network, optimizers)
            # The copy is traced, so that nothing has changed yet if that fails.
            graph = on_all(lambda: self.policy.trace(network, session.example))
        except PassingFailure as error:
            session.postpone(now, error)
            return PruningRecord()
        self.rounds_done = result.rounds
        session.exhausted, session.owed = not result.reached, None
        if result.record:
            result.record.apply_(session.target)
            session.target.load_state_dict(network.state_dict())
            self._optimizer_state = result.optimizer if optimizers else None
            session.graph = graph
        return result.record

    def after_cut_(self, trainer: L.Trainer, session: PruningSession) -> None:
        """Load the winner's optimizer state into the trainer's optimizer."""
        if self._optimizer_state is not None:
            trainer.optimizers[0].load_state_dict(self._optimizer_state)
        self._optimizer_state = None

    def setup(self, trainer: L.Trainer) -> None:
        """Take held-out samples from the training data before its loader is built.

        Raises:
            NotImplementedError: there are several processes.
        """
        if trainer.world_size > 1:
            raise NotImplementedError(
                "a search runs in one process and distributes its candidates itself: train on one device and name "
                "the others in Workers(devices=[0, 1, ...])"
            )
        if isinstance(self.held_out, float):
            self._source = HeldOutSource(training_source(trainer), self.held_out)
            set_training_source(trainer, self._source)

    def teardown(self, trainer: L.Trainer) -> None:
        """Put the original training data back."""
        if self._source is not None and training_source(trainer) is self._source:
            set_training_source(trainer, self._source.source)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check optimizers, length of training, and held-out data.

        Raises:
            NotImplementedError: there are several optimizers, or optimization is manual.
            ValueError: training ends before the rounds, or held-out samples are trained on.
        """
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise NotImplementedError(
                "candidates are trained with one optimizer, automatically; use lightning_prune.netadapt.search with "
                "a loss of your own"
            )
        first = max(self.timing.start, trainer.current_epoch)
        if not self.rounds_done and is_last_epoch(trainer, first - 1):
            raise ValueError(
                f"the rounds run at the end of epoch {first}, counted from 0, but training ends after "
                f"{trainer.max_epochs} epochs: lower start_epoch, or train for longer"
            )
        loader, description = self._held_out_data(trainer)
        check_disjoint(trainer.train_dataloader, loader)
        if not self.rounds_done:
            self._print(trainer, f"candidates are judged on {description}")

    def on_session_start(self, trainer: L.Trainer, session: PruningSession, is_dense: bool) -> None:
        """Check that the first round is possible."""
        if is_dense:
            check_search(session.target, session.example, self.policy, self.rounds)

    def on_first_batch(self, trainer: L.Trainer, session: PruningSession, batch: Any) -> None:
        """Train and judge one copy on the first batch, so that errors show before any training."""
        if self.rounds_done or self.is_finished(session):
            return
        with seeded(0):  # leaves the random state as it would be without: a resumed run rehearses as well
            workers = with_default_device(self.workers, trainer)
            rehearse_candidate(session, lambda: self._rehearsal(trainer, batch), workers)

    def report(self, summary: str, session: PruningSession) -> str:
        """Return the table of rounds, and the line that sums up the cut."""
        resource = next(iter(self.policy.budget))
        return f"{rounds_table(self.rounds_done, resource).markdown()}\n{summary}"

    def forget(self) -> None:
        """Forget the finished rounds."""
        self.rounds_done = []

    def state_dict(self) -> dict[str, Any]:
        """Return the finished rounds as plain values."""
        return {"rounds": [asdict(each) for each in self.rounds_done]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.rounds_done = [Round(**each) for each in state["rounds"]]

    def _held_out_data(self, trainer: L.Trainer) -> tuple[Any, str]:
        """Return the loader on which candidates are judged, and a description of it."""
        if self._source is not None and self._source.held_out is not None:
            number = len(self._source.held_out.dataset)  # type: ignore[arg-type]
            return self._source.held_out, f"{number} training samples that are held out ({self.held_out:.0%})"
        if self.held_out == "val":
            if not trainer.enable_validation:
                raise ValueError(
                    "held_out='val' needs validation data, and there is none: give a share or a loader"
                )
            return trainer.val_dataloaders, "the validation data; report on other data"
        return self.held_out, "the loader that was given"

    def _search(
        self, trainer: L.Trainer, session: PruningSession, network: Any, optimizers: Sequence[Optimizer]
    ) -> SearchResult:
        """Run the search on ``network``, or continue it from the state that an earlier process left."""
        share = target_share(self.policy.budget, session.dense)
        number = self.rounds.rounds or len(self.rounds.reductions(share))
        needed = max(self.rounds.steps, 1) * trainer.accumulate_grad_batches * number + CALIBRATION_BATCHES
        batches = list(islice(train_batches(trainer, torch.device("cpu")), needed))
        held_out = self._held_out_batches(trainer)
        training = self._training(trainer, batches, held_out)
        optimizer_state = optimizers[0].state_dict() if optimizers else None
        workers = with_default_device(self.workers, trainer)
        repair = SearchRepair.of(self.compensate, network, session.example, batches)
        search = Searcher(
            network, session.example, self.policy, training, self.rounds, workers, repair, session.dense
        )
        key = search.key(self.metric, batch_digest(held_out))
        folder = Path(self.folder or Path(trainer.default_root_dir) / "netadapt") / key
        return search.run(optimizer_state, folder, lambda line: self._print(trainer, line), self.verbose)

    def _rehearsal(self, trainer: L.Trainer, batch: Any) -> Training:
        """Return how the rehearsal trains on one batch, and is judged on the first held-out batch of each loader."""
        return self._training(trainer, [batch], self._held_out_batches(trainer, 1))

    def _held_out_batches(self, trainer: L.Trainer, number: int | None = None) -> list[IndexedBatch]:
        """Return the first ``number`` batches of each held-out loader; None: all."""
        loader, _ = self._held_out_data(trainer)
        return held_out_batches(trainer, loader, torch.device("cpu"), number)

    def _training(
        self, trainer: L.Trainer, batches: Sequence[Any], held_out: Sequence[IndexedBatch]
    ) -> Training:
        """Return how candidates are trained on ``batches`` and judged on ``held_out``."""
        return training_from_trainer(
            trainer, self.submodule, batches, held_out, self.metric, self.higher_is_better
        )

    def _print(self, trainer: L.Trainer, line: str) -> None:
        if self.verbose:
            print_line(trainer, line)
