"""Repair of candidates: their layers are fitted to what the network that a round begins with gives on some images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.compensation.calibration import CompensationSettings
from lightning_prune.compensation.sharing import narrowed_targets
from lightning_prune.compensation.targets import Targets, collect_targets
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.surgery.prune import surviving_indices
from lightning_prune.utils.example_inputs import inputs_of
from lightning_prune.utils.hashing import batch_digest

__all__ = ["RoundRepair", "SearchRepair"]

#: number of images that candidates are repaired on
IMAGES = 64
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
    settings: CompensationSettings = SETTINGS

    @classmethod
    def of(cls, batches: Sequence[Any], forward: Callable[..., Any]) -> SearchRepair:
        """Return a repair on the first training batches, until they have ``IMAGES`` images."""
        chosen, number = list[Any](), 0
        for batch in batches:
            inputs = inputs_of(batch, forward)
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
            if tensors and number < IMAGES:
                chosen.append(batch)
                number += len(tensors[0])
        return cls(chosen)

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
    """What all candidates of a round are repaired with.

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
        units = np.unique(np.asarray(list(remove), dtype=np.int64))
        return narrowed_targets(self.targets, model, surviving_indices(graph, graph.kept(units)), device)
