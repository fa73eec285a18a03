"""The repair of one cut: targets are collected before it, and layers are fitted to them after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.compensation.calibration import (
    CompensationError,
    CompensationSettings,
    outputs_of_example,
)
from lightning_prune.compensation.layers import Kept
from lightning_prune.compensation.repair import compensate_
from lightning_prune.compensation.report import CompensationReport
from lightning_prune.compensation.target_records import Targets
from lightning_prune.compensation.targets import collect_targets
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.prune import prune_, surviving_indices
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.example_inputs import Example, is_image_list

__all__ = ["WITHOUT_TRAINING", "CutRepair", "compensation_settings", "num_images"]

FEWEST_IMAGES, FEWEST_ROWS = 32, 256
#: Without the second fit to all images, which doubles the time and gains little where training follows.
WITHIN_TRAINING = CompensationSettings(refit=False)
#: No training follows that would make up for what layers fitted one by one leave.
WITHOUT_TRAINING = CompensationSettings(refine_passes=15)


def compensation_settings(
    compensate: bool | CompensationSettings, default: CompensationSettings = WITHIN_TRAINING
) -> CompensationSettings | None:
    """Return the settings that an argument ``compensate`` stands for; None: cuts are not repaired.

    Args:
        compensate: the argument.
        default: settings that ``True`` stands for.

    Raises:
        ValueError: ``compensate`` is something else.

    Example:
        >>> compensation_settings(False), compensation_settings(True).positions
        (None, 4096)
    """
    if isinstance(compensate, bool):
        return default if compensate else None
    if not isinstance(compensate, CompensationSettings):
        raise ValueError(f"compensate must be True, False or CompensationSettings, got {compensate!r}")
    return compensate


def num_images(model: nn.Module, example: Example, settings: CompensationSettings) -> int:
    """Return the number of images for the repair of ``model``: that of the settings, else by its outputs.

    The last layer is fitted to as many rows as the images have output positions: 32 images are enough for dense
    prediction and detection, 256 are taken for classification.

    Raises:
        CompensationError: the model cannot run on ``example``.

    Example:
        >>> import torch
        >>> dense, image = nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 8, 8)
        >>> num_images(dense, ((image,), {}), CompensationSettings())
        32
        >>> num_images(nn.Sequential(dense, nn.Flatten()), ((image,), {}), CompensationSettings())
        256
    """
    if settings.images is not None:
        return settings.images
    if is_image_list(example):  # the number of boxes says nothing about the positions of the layers
        return FEWEST_IMAGES
    positions = [math.prod(output.shape[2:]) for output in outputs_of_example(model, example)]
    return max(FEWEST_IMAGES, math.ceil(FEWEST_ROWS / max(1, min(positions, default=1))))


class CutRepair:
    """Repairs one cut of a network, and of copies that are cut likewise but later.

    :meth:`prune_` takes the place of :func:`~lightning_prune.prune_`, also several times if surgery refuses units.
    Once all networks are cut, :meth:`repair_` repairs them, each by what it gave itself before the cut. In a
    distributed run every process must call both; only the first one needs batches.

    Args:
        networks: the network, then its copies.
        batches: training batches, whose labels are ignored.
        settings: how much of them is looked at.
        context: returns a context for forwards, such as autocast; cutting and tracing run outside of it.

    Attributes:
        failure: why nothing can be repaired; empty if nothing is known to prevent it.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> images = torch.rand(8, 3, 16, 16)
        >>> graph, repair = trace(net, images[:1]), CutRepair([net], [images], CompensationSettings())
        >>> record = repair.prune_(net, graph, graph.layers["0.weight"][:4])
        >>> repair.repair_()[0].accepted
        True
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        batches: Sequence[Any],
        settings: CompensationSettings,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.networks, self.batches, self.settings, self.context = list(networks), batches, settings, context
        self.failure = ""
        self._targets: list[Targets] = []

    def prune_(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        remove: Units,
        optimizers: Sequence[Optimizer] = (),
        blocks: Sequence[str] = (),
    ) -> PruningRecord:
        """Collect the targets of all networks, and cut ``model``.

        Raises:
            SurgeryError: the cut was refused; nothing was changed.
        """
        self.collect(surviving_indices(graph, graph.kept(remove)))
        return prune_(model, graph, remove, optimizers, blocks)

    def collect(self, kept: Kept) -> None:
        """Collect the targets of all networks for a cut that leaves ``kept``, in place of earlier targets."""
        self._targets = []
        if self.failure:
            return
        try:
            with self.context():
                self._targets = [
                    collect_targets(network, kept, self.batches, self.settings) for network in self.networks
                ]
        except CompensationError as error:
            self.failure = str(error)

    def repair_(self) -> list[CompensationReport]:
        """Repair all networks after the cut, and return their reports; none if targets could not be collected."""
        targets, self._targets = self._targets, []
        reports: list[CompensationReport] = []
        for network, each in zip(self.networks, targets, strict=bool(targets)):
            try:
                with self.context():
                    reports.append(compensate_(network, each, self.batches))
            except CompensationError as error:
                self.failure = str(error)
                reports.append(CompensationReport(False, str(error)))
        return reports
