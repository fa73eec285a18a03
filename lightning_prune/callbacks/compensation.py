"""Repair of the cuts that a callback makes, with images of its trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_prune.compensation.calibration import CompensationError, CompensationSettings
from lightning_prune.compensation.report import CompensationReport
from lightning_prune.pruning.cut_repair import CutRepair, compensation_settings, num_images
from lightning_prune.pruning.session import PruningSession
from lightning_prune.trainer.batches import forward_context
from lightning_prune.trainer.calibration import calibration_batches
from lightning_prune.utils.distributed import from_first

__all__ = ["TrainerCompensation"]

NOT_COLLECTED = "the method does not cut through its session"


class TrainerCompensation:
    """Repairs the cuts of a training with images of its training data, in the precision of its weights.

    If the data cannot be used for that, pruning goes on without repairs, after one warning.

    Args:
        compensate: whether to repair, or settings for it.
    """

    def __init__(self, compensate: bool | CompensationSettings) -> None:
        self.settings = compensation_settings(compensate)
        self._warned = False

    def of_cut(
        self, trainer: L.Trainer, session: PruningSession, copies: Sequence[nn.Module], cut: int
    ) -> CutRepair | None:
        """Return the repair of the next cut, with its images; None if cuts are not to be repaired.

        Args:
            trainer: its training data and precision are used.
            session: the network.
            copies: averaged copies of the network, which are cut after it.
            cut: number of the cut, which determines the images.
        """
        if self.settings is None:
            return None
        repair = CutRepair([session.target, *copies], [], self.settings, partial(without_autocast, trainer))

        def draw() -> None:
            with without_autocast(trainer):
                number = num_images(session.target, session.example, repair.settings)
            repair.batches = calibration_batches(trainer, session.target, number, seed=cut)

        try:
            from_first(draw)
        except CompensationError as error:
            repair.failure = str(error)
        return repair

    def repair_(self, repair: CutRepair) -> CompensationReport:
        """Repair the network and its copies after the cut; return the report of the network."""
        reports = repair.repair_()
        if repair.failure and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"cuts are not repaired: {repair.failure}. Set compensate=False, or have training batches begin with "
                "what the forward takes"
            )
        return reports[0] if reports else CompensationReport(False, repair.failure or NOT_COLLECTED)


@contextmanager
def without_autocast(trainer: L.Trainer) -> Iterator[None]:
    """Run forwards as in training, but in the precision of the weights.

    Half precision would round what layers are fitted to. Outputs that training never sees overflow it, as those of a
    hardly trained network in eval mode.
    """
    with forward_context(trainer), torch.autocast(trainer.strategy.root_device.type, enabled=False):
        yield
