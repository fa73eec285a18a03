"""``FilterPruningCallback``: prune by a criterion at the end of chosen epochs or steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import lightning as L

from lightning_prune.callbacks.method_callback import PruningCallback
from lightning_prune.callbacks.methods.filter_pruning import FilterPruning
from lightning_prune.compensation.calibration import CompensationSettings
from lightning_prune.criteria.base import CriterionLike
from lightning_prune.criteria.ipad import default_criterion
from lightning_prune.pruning.regular_cuts import StatisticsMode, with_amount
from lightning_prune.pruning.schedules import timing_of
from lightning_prune.selection.depth_settings import DepthSettings
from lightning_prune.selection.policy import PolicyArguments, PruningPolicy, with_depth
from lightning_prune.trainer.followers import Followers
from lightning_prune.trainer.retraining import OptimizerMode, Retraining

__all__ = ["FilterPruningCallback"]


class FilterPruningCallback(PruningCallback):
    """Remove filters for good at the end of chosen epochs or steps, and let training continue.

    Each cut traces dependencies, scores units by ``criterion``, selects the least important ones until the budget
    (or this step's amount) is reached, and removes them from the module; the cut is proven or rolled back. The
    LightningModule needs no change: what is traced is its ``forward`` on ``example_input_array``, else on one sample
    of the first training batch.

    Args:
        budget: what must remain: a resource or several -> a share of the dense network in (0, 1], or an absolute
            amount above 1; or a whole :class:`~lightning_prune.PruningPolicy`.
        amount: what is removed in one cut, in the same way; by default a tenth of the dense network in each resource
            of the budget.
        every_n_epochs: epochs between cuts.
        start_epoch: the first cut comes at the end of this epoch (Lightning counts from 0).
        every_n_steps: optimizer steps between cuts, which then come within epochs, instead of epochs.
        start_step: the first of them comes after this many steps; by default ``every_n_steps``.
        schedule: number of the cut -> share of what has to be removed that is removed after it, instead of an
            ``amount``: :class:`~lightning_prune.Linear`, :class:`~lightning_prune.Cubic` or a function.
        criterion: scores the units: a criterion of :mod:`lightning_prune.criteria` or a plain function; by default
            ``IPAD(omega=0.25, terms="energy")``, the best on validation in docs/results/quality.md.
        optimizer: ``"carry"`` cuts the state of optimizers along and continues, schedulers included; ``"reset"``
            builds both anew after a cut, as IPAD does.
        final_phase: how training continues when pruning is over, because the budget is met or nothing is left to
            remove: a :class:`~lightning_prune.FinalPhase`, or a function of the module that returns what its
            ``configure_optimizers`` would.
        statistics: collected during the ``"epoch"`` that ends with a cut, over all its batches (or over the steps
            since the last cut), or in a ``"pass"`` of its own over the training data, in eval mode. Under
            ``torch.compile``, where hooks do not run, it is always a pass.
        submodule: qualified name of the part to prune, if it is not the whole module. It must take the same input.
        compensate: after each cut, fit the remaining layers so that the outputs come near to those before the cut, on
            some training images and without labels; moving averages likewise. Undone if images that were not fitted
            say that it did not help. Needs training batches that hold what the forward takes: a tensor, a sequence
            that begins with it, or a mapping with the names of its arguments. ``CompensationSettings`` in place of
            True say how much is looked at. See :func:`~lightning_prune.compensation.cut_and_compensate_`.
        depth: whether residual blocks may vanish as a whole, besides channels and for the same budget, or
            :class:`~lightning_prune.DepthSettings` that say which. They are scored on some training images.
        followers: names of copies of the network in the LightningModule that it keeps itself (mean teacher, momentum
            encoder, target network), which are cut along; or a mapping copy -> original. None: a warning names
            modules of equal structure, and one that is updated by hand stops training before the first cut. ``[]``
            leaves them as they are.
        lr_warmup_steps: optimizer steps after each cut in which the learning rates rise linearly to what they would
            be otherwise, for any optimizer and scheduler.
        recalibrate_batches: after a cut, estimate the running statistics of batch norms on this many training
            batches, before anything is scored; None: 0 if the cut was repaired, else 16, or 0 for a cut within an
            epoch if the training loader has persistent workers, which a second pass would restart.
        verbose: print one line per cut.
        policy: ``limits``, ``exclude``, ``channel_multiple``, ``resources``, ``selection``: see
            :class:`~lightning_prune.PruningPolicy`.

    Attributes:
        record: what was removed so far, relative to the dense network; None before the first cut.
        history: a summary of every cut.
        copies: modules that are cut along, averages too -> the module of which each is a copy.

    After each cut ``on_after_prune(record)`` of the LightningModule is called, if it defines it, for everything else
    that depends on shapes, such as anchors of EWC (:meth:`PruningRecord.cut_tensors
    <lightning_prune.PruningRecord.cut_tensors>`); and that of the pruned submodule. Names in the record are relative
    to the module that defines it. It is also called, with all cuts so far, before the weights of a checkpoint are
    loaded into a dense module.

    Logged besides the costs, for each repaired cut: ``prune/change`` and ``prune/change_unrepaired``, the squared
    distance of the outputs from those before the cut as a share of their variance, with and without the repair.

    Raises:
        ValueError: an argument is out of range; when fitting starts: a name matches nothing, the budget cannot be
            met, there is nothing to prune, or no example input can be found. All before anything changes.

    Example:
        >>> callback = FilterPruningCallback(budget={"macs": 0.5}, every_n_epochs=2)
        >>> callback.policy.amount
        {'macs': 0.1}
    """

    def __init__(
        self,
        budget: Mapping[str, float] | PruningPolicy,
        *,
        amount: Mapping[str, float] | None = None,
        every_n_epochs: int = 1,
        start_epoch: int = 1,
        every_n_steps: int | None = None,
        start_step: int | None = None,
        schedule: Callable[[int], float] | None = None,
        criterion: CriterionLike | None = None,
        optimizer: OptimizerMode = "carry",
        final_phase: Callable[[L.LightningModule], Any] | None = None,
        statistics: StatisticsMode = "epoch",
        submodule: str | None = None,
        compensate: bool | CompensationSettings = True,
        depth: bool | DepthSettings | None = None,
        followers: Followers = None,
        lr_warmup_steps: int = 0,
        recalibrate_batches: int | None = None,
        verbose: bool = True,
        **policy: Unpack[PolicyArguments],
    ) -> None:
        timing = timing_of(every_n_epochs, start_epoch, every_n_steps, start_step, schedule)
        whole_policy = with_amount(PruningPolicy.of(budget, **policy).with_budget(), amount, schedule)
        whole_policy = with_depth(whole_policy, depth)
        method = FilterPruning(whole_policy, timing, criterion or default_criterion(), statistics)
        retraining = Retraining(optimizer, final_phase, recalibrate_batches, lr_warmup_steps)
        super().__init__(method, retraining, submodule, verbose, compensate, followers)
