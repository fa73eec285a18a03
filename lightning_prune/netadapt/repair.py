"""Repair of candidates: their layers are fitted to what the network that a round begins with gives on some images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.compensation.calibration import CompensationSettings
from lightning_prune.compensation.sharing import narrowed_targets
from lightning_prune.compensation.target_records import Targets
from lightning_prune.compensation.targets import collect_targets
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.pruning.cut_repair import compensation_settings, num_images
from lightning_prune.surgery.prune import surviving_indices
from lightning_prune.utils.example_inputs import Example, inputs_of, num_samples
from lightning_prune.utils.hashing import batch_digest

__all__ = ["RoundRepair", "SearchRepair"]

#: One damping and few positions: a candidate removes little, and there are many of them.
SETTINGS = CompensationSettings(positions=1024, dampings=(1e-2,), refit=False)


@dataclass(frozen=True)
class SearchRepair:
    """Images that candidates of all rounds are repaired on, and sizes of samples.

    Attributes:
        batches: on the CPU; labels are ignored.
        settings: sizes of samples.
    """

    batches: Sequence[Any]
    settings: CompensationSettings

    @classmethod
    def of(
        cls,
        compensate: bool | CompensationSettings,
        model: nn.Module,
        example: Example,
        batches: Sequence[Any],
    ) -> SearchRepair | None:
        """Return the repair that an argument ``compensate`` stands for; None: candidates are not repaired.

        Args:
            compensate: True: with ``SETTINGS``.
            model: the network; the number of images depends on its outputs.
            example: positional and keyword inputs of its forward.
            batches: for training; the first of them are used, until they have enough images.

        Raises:
            ValueError: ``compensate`` is something else.
        """
        settings = compensation_settings(compensate, SETTINGS)
        if settings is None:
            return None
        number, chosen = num_images(model, example, settings), list[Any]()
        for batch in batches:
            size = num_samples(inputs_of(batch, model.forward))
            if size and number > 0:
                chosen.append(batch)
                number -= size
        return cls(chosen, settings)

    def description(self) -> list[Any]:
        """Return all that the repairs depend on, as plain values."""
        return [batch_digest(self.batches), vars(self.settings)]

    def of_round(self, model: nn.Module) -> RoundRepair:
        """Run the network that a round begins with once, on its device; all candidates share what it gives.

        Raises:
            CompensationError: the batches cannot be used.
        """
        targets = collect_targets(model, {}, self.batches, self.settings)
        return RoundRepair(self.batches, narrowed_targets(targets, model, {}, torch.device("cpu")))


@dataclass(frozen=True)
class RoundRepair:
    """Images and targets for the repair of all candidates of a round.

    Attributes:
        batches: images, on the CPU; labels are ignored.
        targets: what the network that the round begins with gives on them, at all filters, on the CPU.
    """

    batches: Sequence[Any]
    targets: Targets

    def targets_of(
        self, model: nn.Module, graph: ChannelGraph, remove: Iterable[int], device: torch.device
    ) -> Targets:
        """Return the targets of a candidate, on ``device``; ``model`` is the network before its cut."""
        return narrowed_targets(self.targets, model, surviving_indices(graph, graph.kept(remove)), device)
