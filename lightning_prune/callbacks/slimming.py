"""``SlimmingCallback``: a sparsity penalty on the scales of norms, and the removal of channels with small scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

from lightning_prune.callbacks.method_callback import PruningCallback
from lightning_prune.callbacks.methods.slimming import Slimming
from lightning_prune.compensation.calibration import CompensationSettings
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.policy import PolicyArguments, PruningPolicy
from lightning_prune.slimming.bias_folding import Folded
from lightning_prune.slimming.policy import SlimmingPolicy
from lightning_prune.trainer.followers import Followers
from lightning_prune.trainer.retraining import OptimizerMode, Retraining

__all__ = ["SlimmingCallback"]


class SlimmingCallback(PruningCallback):
    """Push the scales of norms towards 0, expensive channels harder, and cut the channels that have reached it.

    Before each optimizer step ``rho * p * sign(gamma)`` is added to the gradients of the chosen scales, where ``p``
    is a channel's share in the costs (:func:`~lightning_prune.slimming.channel_costs`): as if the loss contained
    ``rho * sum p |gamma|``, added once per step, before clipping. A unit is *masked* while all of its scales are at
    or below the threshold, in the model and in its moving average. When the masked units' MACs reach ``shrink_at``,
    they are cut at the end of the epoch, with moving averages and optimizer state. In the last epoch the moving
    average alone decides, and a budget, if there is one, is met exactly, smallest scales first. The constant output
    that a removed channel still had (its shift) is folded into what follows.

    Network slimming (Liu et al., ICCV 2017) with the cost-weighted penalty of AtomNAS (Mei et al., ICLR 2020). Proof,
    checkpoints, resuming, DDP and averages work as for :class:`~lightning_prune.FilterPruningCallback`.

    The moving average is that of Lightning's ``WeightAveraging`` or any ``AveragedModel``, if there is one, else one
    of the scales that the callback keeps itself.

    Args:
        budget: what must remain, or a whole :class:`~lightning_prune.PruningPolicy`; shrinking and penalty end as
            soon as it is met, and in the last epoch it is met exactly. None: only what the threshold says is cut.
        rho: weight of the penalty.
        by: resource whose costs make ``p``: ``"macs"``, ``"params"``, or any other that the graph counts.
        norms: names or globs of the norms to slim, or of their containers; by default all that have a channel which
            may be removed. A unit without any of them is never removed.
        threshold: of ``|gamma|``.
        shrink_at: cut when the masked units have this share of the dense MACs.
        end_epoch: penalty and shrinking end with this epoch, and training continues without; by default the last one.
        warmup_epochs: epochs over which rho rises linearly from 0; or
        warmup_steps: optimizer steps, likewise.
        average_decay: of the moving average that the callback keeps itself, per optimizer step.
        optimizer: ``"carry"`` cuts the optimizers' state along, ``"reset"`` builds them anew.
        submodule: qualified name of the part to prune, if it is not the whole module.
        compensate: after each cut, and after folding, fit the remaining layers so that the outputs come near to those
            before the cut; see :class:`~lightning_prune.FilterPruningCallback`.
        followers: copies of the network that the module keeps itself, which are cut along; see
            :class:`~lightning_prune.FilterPruningCallback`.
        lr_warmup_steps: optimizer steps after each cut in which the learning rates rise linearly to what they would
            be otherwise.
        recalibrate_batches: after a cut, estimate the statistics of batch norms on this many training batches; by
            default 16 if the cut was not repaired, else 0.
        verbose: print one line per cut.
        policy: ``limits`` (by default none), ``exclude``, ``channel_multiple``, ``resources``, ``selection``: see
            :class:`~lightning_prune.PruningPolicy`.

    Attributes:
        changes: for every cut, how much it changed the outputs on a training batch, in eval mode:
            ``||after - before|| / ||before||``, after folding, and before repair and recalibration.
        folded: for every cut, the number of layers into which shifts were folded.

    Logged at the end of each epoch: ``prune/penalty`` (with rho), ``prune/rho``, ``prune/masked`` (share of the dense
    MACs before the cut) and, after a cut, ``prune/change``: see :class:`~lightning_prune.FilterPruningCallback`.

    Raises:
        ValueError: an argument is out of range; when fitting starts: a name matches no norm, there is no norm to
            slim, the threshold is above all scales, the resource is unknown, or the budget cannot be met. All
            before anything changes.

    Example:
        >>> slimming = SlimmingCallback(budget={"macs": 0.5}, rho=1e-3, norms=["*.bn2"], end_epoch=15)
        >>> slimming.policy.threshold
        0.001
    """

    method: Slimming

    def __init__(
        self,
        budget: Mapping[str, float] | PruningPolicy | None = None,
        *,
        rho: float = 1e-4,
        by: str = "macs",
        norms: Sequence[str] = (),
        threshold: float = 1e-3,
        shrink_at: float = 0.05,
        end_epoch: int | None = None,
        warmup_epochs: int = 0,
        warmup_steps: int = 0,
        average_decay: float = 0.9,
        optimizer: OptimizerMode = "carry",
        submodule: str | None = None,
        compensate: bool | CompensationSettings = True,
        followers: Followers = None,
        lr_warmup_steps: int = 0,
        recalibrate_batches: int | None = None,
        verbose: bool = True,
        **policy: Unpack[PolicyArguments],
    ) -> None:
        whole_policy = PruningPolicy.of(budget or {}, default_limits=Limits(layers=1.0), **policy)
        whole_policy = whole_policy.without_depth("SlimmingCallback")
        method = Slimming(
            SlimmingPolicy.from_policy(whole_policy, threshold, norms),
            rho=rho,
            by=by,
            shrink_at=shrink_at,
            end_epoch=end_epoch,
            warmup_epochs=warmup_epochs,
            warmup_steps=warmup_steps,
            average_decay=average_decay,
            submodule=submodule,
        )
        retraining = Retraining(optimizer, batches=recalibrate_batches, warmup_steps=lr_warmup_steps)
        super().__init__(method, retraining, submodule, verbose, compensate, followers)

    @property
    def within_budget(self) -> bool:
        """Whether the present network meets the budget; without a budget, whether shrinking is over."""
        return super().within_budget if self.policy.budget else self.method.is_closed

    @property
    def finished(self) -> bool:
        """Whether there is no more penalty and no more shrinking, also after training."""
        return self.method.is_closed or super().finished

    @property
    def changes(self) -> list[float]:
        """Relative change of the outputs, for every cut."""
        return self.method.changes

    @property
    def folded(self) -> list[Folded]:
        """Number of layers into which shifts were folded, for every cut."""
        return self.method.folded
