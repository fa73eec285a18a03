"""``NetAdaptCallback``: a NetAdapt search at the end of one epoch, after which training continues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

from torch.utils.data import DataLoader

from lightning_prune.callbacks.method_callback import PruningCallback
from lightning_prune.callbacks.methods.netadapt import NetAdapt
from lightning_prune.compensation.calibration import CompensationSettings
from lightning_prune.criteria.base import CriterionLike
from lightning_prune.criteria.weights import L2
from lightning_prune.netadapt.rounds import Round, Rounds
from lightning_prune.netadapt.workers import Workers
from lightning_prune.pruning.cut_repair import compensation_settings
from lightning_prune.selection.policy import PolicyArguments, PruningPolicy
from lightning_prune.trainer.followers import Followers
from lightning_prune.trainer.retraining import OptimizerMode, Retraining
from lightning_prune.utils.arguments import check_choice
from lightning_prune.utils.metrics import higher_is_better

__all__ = ["NetAdaptCallback"]

Mode = Literal["max", "min"]


class NetAdaptCallback(PruningCallback):
    """Prune to the budget at the end of one epoch, in rounds of competing candidates (NetAdapt).

    See :func:`~lightning_prune.netadapt.search`. Candidates are copies of the network that are trained by the
    module's ``training_step`` with an optimizer like the trainer's, and judged by what its ``validation_step`` logs,
    on data held out from all training. The training network takes over the last winner's cut and weights.

    Args:
        budget: what must remain of one resource: a share of the dense network in (0, 1], or an absolute amount above
            1; or a whole :class:`~lightning_prune.PruningPolicy`.
        start_epoch: the rounds run at the end of this epoch (Lightning counts from 0), or of the first later one
            that is trained.
        rounds: schedule, steps and blocks; by default ten equal rounds, ten blocks, one step for each candidate.
        workers: where candidates are trained; without ``devices`` on the trainer's GPU, if it has one.
        criterion: scores the filters within a block; by default L2.
        held_out: a share of the training samples, which are taken out of the training loader from the beginning; or
            a loader of other data; or ``"val"``: the validation data, if they serve no other purpose.
        metric: name of a value that the validation logs.
        mode: ``"max"`` or ``"min"``; None: ``"min"`` if the name says loss or error, else ``"max"``.
        optimizer: ``"carry"``: candidates continue with the optimizer's state, and training with the winner's;
            ``"reset"``: new optimizers for all.
        submodule: qualified name of the part to prune, if it is not the whole module.
        folder: where the state is stored after each round, in a folder per search; by default ``netadapt`` in the
            trainer's ``default_root_dir``.
        compensate: repair each candidate after its cut, before it is trained: fit its layers to what the network that
            the round begins with gives on some training images; see :func:`~lightning_prune.netadapt.search`.
        followers: copies of the network that the module keeps itself, which are cut along; see
            :class:`~lightning_prune.FilterPruningCallback`.
        recalibrate_batches: after the rounds, estimate the statistics of batch norms on this many training batches;
            by default 16.
        verbose: print a line per round, and a table at the end; on a terminal, show progress over candidates.
        policy: ``limits``, ``exclude``, ``channel_multiple``, ``resources``, ``selection``: see
            :class:`~lightning_prune.PruningPolicy`.

    Attributes:
        rounds_done: a summary of each round.

    Raises:
        ValueError: an argument is out of range; when fitting starts: as ``search``, or the held-out data overlaps
            the training data, or training ends before the rounds.
        NotImplementedError: several processes, or several optimizers.

    Example:
        >>> callback = NetAdaptCallback({"macs": 0.5}, start_epoch=5, held_out=0.2, metric="val/miou")
        >>> callback.higher_is_better
        True
    """

    method: NetAdapt

    def __init__(
        self,
        budget: Mapping[str, float] | PruningPolicy,
        *,
        start_epoch: int = 1,
        rounds: Rounds | None = None,
        workers: Workers | None = None,
        criterion: CriterionLike | None = None,
        held_out: float | Literal["val"] | DataLoader[Any] = 0.2,
        metric: str = "val/loss",
        mode: Mode | None = None,
        optimizer: OptimizerMode = "carry",
        submodule: str | None = None,
        folder: str | Path | None = None,
        compensate: bool | CompensationSettings = True,
        followers: Followers = None,
        recalibrate_batches: int | None = None,
        verbose: bool = True,
        **policy: Unpack[PolicyArguments],
    ) -> None:
        if start_epoch < 0:
            raise ValueError(f"need start_epoch >= 0, got {start_epoch}")
        if mode is not None:
            check_choice("mode", mode, get_args(Mode))
        _check_held_out(held_out)
        compensation_settings(compensate)
        rounds = rounds or Rounds(rounds=10, decay=1.0, steps=1, blocks=10)
        method = NetAdapt(
            PruningPolicy.of(budget, **policy).with_budget().without_depth("NetAdaptCallback"),
            start_epoch,
            replace(rounds, criterion=criterion or L2()),
            workers or Workers(),
            held_out,
            metric,
            higher_is_better(metric, mode),
            submodule,
            folder,
            verbose,
            compensate,
        )
        super().__init__(
            method,
            Retraining(optimizer, batches=recalibrate_batches),
            submodule,
            verbose,
            followers=followers,
        )

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher metric is better."""
        return self.method.higher_is_better

    @property
    def rounds_done(self) -> list[Round]:
        """A summary of each round."""
        return self.method.rounds_done

    @property
    def steps(self) -> int:
        """Optimizer steps of all candidates."""
        return sum(each.steps for each in self.rounds_done)


def _check_held_out(held_out: float | str | DataLoader[Any]) -> None:
    """Raise ValueError if ``held_out`` is neither a share, nor a loader, nor ``"val"``."""
    if isinstance(held_out, str):
        check_choice("held_out", held_out, ("val",))
    elif isinstance(held_out, int | float) and not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share in (0, 1), a loader or 'val', got {held_out}")
