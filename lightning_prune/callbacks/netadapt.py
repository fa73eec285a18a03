"""``NetAdaptCallback``: the rounds of a search at the end of one epoch; then training goes on (level 4)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_prune.callbacks.candidate_training import (
    detached_copy,
    rehearse_candidate,
    training_from_trainer,
    with_default_device,
)
from lightning_prune.callbacks.held_out_data import HeldOutSource, check_disjoint
from lightning_prune.callbacks.pruning import THREE_QUARTERS, FilterPruningCallback
from lightning_prune.criteria.base import Criterion
from lightning_prune.criteria.weights import L2
from lightning_prune.graph.channel_graph import Resource
from lightning_prune.netadapt.ranking import CALIBRATION
from lightning_prune.netadapt.rounds import Round, Rounds, SearchResult, rounds_table
from lightning_prune.netadapt.run import check
from lightning_prune.netadapt.searcher import Search, target_share
from lightning_prune.netadapt.workers import Workers
from lightning_prune.pruning.cut_summary import CutSummary
from lightning_prune.pruning.session import PruningSession
from lightning_prune.pruning.training import Training
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.plan import Stop
from lightning_prune.trainer.batches import held_out_batches, train_batches
from lightning_prune.trainer.lightning_internals import set_training_source, training_source
from lightning_prune.trainer.retraining import OptimizerMode
from lightning_prune.trainer.training_state import is_last_epoch, print_line
from lightning_prune.trainer.weight_averaging import averaged_copies
from lightning_prune.utils.arguments import check_choice
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.hashing import batch_digest
from lightning_prune.utils.seeding import seeded

__all__ = ["NetAdaptCallback"]

Mode = Literal["max", "min"]
BY_NORM, TEN_ROUNDS, ALONE = L2(), Rounds(rounds=10, decay=1.0, steps=1, blocks=10), Workers()
ONCE = 1_000_000_000


class NetAdaptCallback(FilterPruningCallback):
    """At the end of one epoch, prunes to the budget in rounds of competing candidates (NetAdapt).

    See :func:`~lightning_prune.netadapt.run.search`. Candidates are copies of the network that are trained by the
    module's ``training_step`` with an optimizer like the trainer's, and judged by what its ``validation_step`` logs,
    on data held out from all training. The training network takes over the last winner's cut and weights.

    Args:
        budget: what is to remain of one resource, a share of the dense network in (0, 1] or an absolute amount.
        start_epoch: the rounds run at the end of this epoch (Lightning counts from 0), or the first one after it
            that is trained.
        rounds: schedule, steps and blocks. By default ten equal rounds, ten blocks, and one step for each candidate.
        workers: where candidates are computed; without ``devices`` on the trainer's GPU, if it has one.
        criterion: which filters of a block go.
        held_out: a share of the training samples, which are taken out of the training loader from the beginning;
            or a loader of other data; or ``"val"``: the validation data, if they serve no other end.
        metric: name of what the validation logs.
        mode: ``"max"`` or ``"min"``; None: ``"min"`` for what is called loss or error.
        limits: how much of a layer or block may go.
        exclude: names or globs of layers, or of what holds them, whose filters stay.
        channel_multiple: layers that are cut keep a multiple of this many channels.
        resources: further resources by name, so that the budget may be in them.
        optimizer: ``"carry"``: candidates go on with the optimizer's state, and training with the winner's;
            ``"reset"``: fresh ones for all.
        submodule: qualified name of the part to prune, if it is not the whole module.
        folder: where the state is kept after each round, in a folder for each search; by default
            ``netadapt`` in the trainer's ``default_root_dir``.
        recalibrate_batches: as for :class:`~lightning_prune.callbacks.pruning.FilterPruningCallback`.
        verbose: print a line per round, and a table in the end; on a terminal, count candidates meanwhile.

    Attributes:
        rounds_done: the facts of each round.

    Raises:
        ValueError: an argument is out of range; when fitting starts: as ``search``, or the held-out data overlaps
            the training data, or training ends before the rounds.
        NotImplementedError: several processes, or several optimizers.

    Example:
        >>> callback = NetAdaptCallback({"macs": 0.5}, start_epoch=5, held_out=0.2, metric="val/miou")
        >>> callback.higher_is_better
        True
    """

    def __init__(
        self,
        budget: Mapping[str, float],
        *,
        start_epoch: int = 1,
        rounds: Rounds = TEN_ROUNDS,
        workers: Workers = ALONE,
        criterion: Criterion = BY_NORM,
        held_out: float | Literal["val"] | DataLoader[Any] = 0.2,
        metric: str = "val/loss",
        mode: Mode | None = None,
        limits: Limits = THREE_QUARTERS,
        exclude: Sequence[str] = (),
        channel_multiple: int = 1,
        resources: Mapping[str, Resource] | None = None,
        optimizer: OptimizerMode = "carry",
        submodule: str | None = None,
        folder: str | Path | None = None,
        recalibrate_batches: int | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__(
            budget,
            every_n_epochs=ONCE,
            start_epoch=start_epoch,
            criterion=criterion,
            limits=limits,
            exclude=exclude,
            channel_multiple=channel_multiple,
            resources=resources,
            optimizer=optimizer,
            submodule=submodule,
            recalibrate_batches=recalibrate_batches,
            verbose=verbose,
        )
        if mode is not None:
            check_choice("mode", mode, get_args(Mode))
        if isinstance(held_out, str):
            check_choice("held_out", held_out, ("val",))
        elif isinstance(held_out, int | float) and not 0 < held_out < 1:
            raise ValueError(f"held_out must be a share in (0, 1), a loader or 'val', got {held_out}")
        self.rounds, self.workers = replace(rounds, criterion=criterion), workers
        self.held_out, self.metric, self.folder = held_out, metric, folder
        falls = mode == "min" or (mode is None and ("loss" in metric or "error" in metric))
        self.higher_is_better = not falls
        self.rounds_done: list[Round] = []
        self._carved: HeldOutSource | None = None
        self._rehearsed = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Hold samples out of the training data before it is asked for."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if trainer.world_size > 1:
            raise NotImplementedError(
                "a search runs in one process and spreads its candidates itself: train on one device and name the "
                "others in Workers(devices=[0, 1, ...])"
            )
        self._rehearsed = False
        if isinstance(self.held_out, float):
            self._carved = HeldOutSource(training_source(trainer), self.held_out)
            set_training_source(trainer, self._carved)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find what is wrong with optimizers and data before anything is trained."""
        super().on_train_start(trainer, pl_module)
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            raise NotImplementedError(
                "candidates are trained with one optimizer, automatically; use lightning_prune.netadapt.run.search with "
                "a loss of your own"
            )
        first = max(self.timing.start, trainer.current_epoch)
        if not self.rounds_done and is_last_epoch(trainer, first - 1):
            raise ValueError(
                f"the rounds run at the end of epoch {first}, counted from 0, but training ends after "
                f"{trainer.max_epochs} epochs: lower start_epoch, or train for longer"
            )
        loader, what = self._held_out(trainer)
        check_disjoint(trainer.train_dataloader, loader)
        if not self.rounds_done:
            self._tell(trainer, f"candidates are judged on {what}")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Train and judge a copy on the first batch, so that what candidates cannot do shows before anything."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._run is not None and not self._rehearsed and not self.rounds_done and not self.finished:
            with seeded(0):  # a resumed run rehearses, too, and draws what it would have drawn
                rehearse_candidate(
                    self._run,
                    lambda: self._training(trainer, [batch], 1),
                    with_default_device(self.workers, trainer),
                )
        self._rehearsed = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave hooks and loaders as they were."""
        super().teardown(trainer, pl_module, stage)
        if self._carved is not None and training_source(trainer) is self._carved:
            set_training_source(trainer, self._carved.source)

    def state_dict(self) -> dict[str, Any]:
        """What has been done so far, as plain numbers."""
        return {**super().state_dict(), "rounds": [asdict(each) for each in self.rounds_done]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        super().load_state_dict(state_dict)
        self.rounds_done = [Round(**each) for each in state_dict["rounds"]]

    @property
    def steps(self) -> int:
        """Optimizer steps of all candidates."""
        return sum(each.steps for each in self.rounds_done)

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, example: Example) -> PruningSession:
        run = super()._start(trainer, pl_module, example)
        if self.record is None:
            check(run.target, run.example, self.rules, self.rounds)
        return run

    def _in_a_pass(self, compiled: bool) -> bool:
        return True  # each round gathers what its criterion wants to know

    def _held_out(self, trainer: L.Trainer) -> tuple[Any, str]:
        """The loader, and in words what it is."""
        if self._carved is not None and self._carved.held_out is not None:
            number = len(self._carved.held_out.dataset)  # type: ignore[arg-type]
            return self._carved.held_out, f"{number} training samples that are held out ({self.held_out:.0%})"
        if self.held_out == "val":
            if not trainer.enable_validation:
                raise ValueError(
                    "held_out='val' needs validation data, and there is none: give a share or a loader"
                )
            return trainer.val_dataloaders, "the validation data; report on other data"
        return self.held_out, "the loader that was given"

    def _prune(self, trainer: L.Trainer, run: PruningSession, now: int) -> None:
        """All rounds, and what has to follow them."""
        start, before, copies = (
            time.perf_counter(),
            run.graph,
            averaged_copies(trainer, trainer.lightning_module),
        )
        network = detached_copy(run.target)
        found = self._searched(trainer, run, network)
        self.rounds_done = found.rounds
        run.exhausted = not found.reached
        if not found.record:
            return
        found.record.apply_(run.target)
        run.target.load_state_dict(network.state_dict())
        self._take(trainer, found.record, copies)
        if self.retraining.mode == "carry" and found.optimizer is not None:
            trainer.optimizers[0].load_state_dict(found.optimizer)
        run.graph = self.rules.traced(run.target, run.example)
        self._follow(trainer, run, copies, now)
        stopped: Stop = "limits" if run.exhausted else "budget"
        seconds = time.perf_counter() - start
        self.history.append(CutSummary.between(before, run.graph, run.dense, stopped, now, seconds))
        resource = next(iter(self.rules.budget))
        self._tell(trainer, f"{rounds_table(found.rounds, resource).markdown()}\n{self.history[-1]}")

    def _tell(self, trainer: L.Trainer, line: str) -> None:
        if self.verbose:
            print_line(trainer, line)

    def _due(self, trainer: L.Trainer, now: int, run: PruningSession) -> bool:
        """Once: at the first chance from ``start_epoch`` on."""
        return now >= self.timing.start and not self.rounds_done and self._to_go(trainer, run)

    def _searched(self, trainer: L.Trainer, run: PruningSession, network: Any) -> SearchResult:
        plan = self.rounds.rounds or len(self.rounds.reductions(target_share(self.rules.budget, run.dense)))
        wanted = max(self.rounds.steps, 1) * trainer.accumulate_grad_batches * plan + CALIBRATION
        batches = list(islice(train_batches(trainer, torch.device("cpu")), wanted))
        training = self._training(trainer, batches)
        state = trainer.optimizers[0].state_dict() if self.retraining.mode == "carry" else None
        job = Search(
            network,
            run.example,
            self.rules,
            training,
            self.rounds,
            with_default_device(self.workers, trainer),
        )
        key = job.key(self.metric, batch_digest(training.evaluate.batches))  # type: ignore[attr-defined]
        folder = Path(self.folder or Path(trainer.default_root_dir) / "netadapt") / key
        return job.run(state, folder, lambda line: self._tell(trainer, line), self.verbose)

    def _training(self, trainer: L.Trainer, batches: Sequence[Any], judged: int | None = None) -> Training:
        """How candidates are trained on ``batches``; and judged, on the first ``judged`` of each held-out loader."""
        loader, _ = self._held_out(trainer)
        held = held_out_batches(trainer, loader, torch.device("cpu"), judged)
        return training_from_trainer(
            trainer, self.submodule, batches, held, self.metric, self.higher_is_better
        )
