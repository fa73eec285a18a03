"""Targets of a repair: outputs of the dense network and its layers at the filters that a cut leaves."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_prune.compensation.calibration import CompensationSettings
from lightning_prune.compensation.im2col import Positions
from lightning_prune.compensation.value_watch import CallKey

__all__ = ["CallTargets", "SampledRows", "Targets", "compute_dtype"]


@dataclass(frozen=True)
class SampledRows:
    """Outputs of a layer at sampled positions.

    Attributes:
        positions: of the rows.
        rows: (positions, filters).
        slack: what may be added to ``rows``: everything up to a positive number, or down to a negative one, since the
            activation behind the layer makes the same of it; 0: nothing. None: nowhere.
    """

    positions: Positions
    rows: Tensor
    slack: Tensor | None = None

    def first(self, number: int) -> SampledRows:
        """Return the first ``number`` rows."""
        positions = tuple(index[:number] for index in self.positions)
        slack = None if self.slack is None else self.slack[:number].clone()
        return SampledRows(positions, self.rows[:number].clone(), slack)

    def with_slack(self, lower: Tensor, upper: Tensor, sign: Tensor) -> SampledRows:
        """Return the rows with the slack that an activation gives them.

        Args:
            lower: for each filter, the layer's output at the lower end of the interval of the activation, (filters,).
            upper: in the same way.
            sign: -1 where the layer's output is inverted on its way to the activation, 0 where it does not get there.
        """
        below = (self.rows - lower) * sign < 0
        above = (self.rows - upper) * sign > 0
        slack = torch.where(below, lower - self.rows, torch.where(above, upper - self.rows, 0))
        return SampledRows(self.positions, self.rows, slack)


@dataclass(frozen=True)
class CallTargets:
    """Sampled outputs of one call of a dense layer, at the filters that survive.

    Attributes:
        shape: of the layer's output, without channels.
        fit: rows of the images that the layer is fitted to.
        held: rows of the images that judge the fit.
        norm: the batch norm that reads the output, if it reads no other weight's.
        sums: as ``fit`` and ``held``, of the sum that alone reads the output, directly or behind a norm.
    """

    shape: torch.Size
    fit: SampledRows
    held: SampledRows
    norm: str | None = None
    sums: tuple[SampledRows, SampledRows] | None = None


@dataclass
class Targets:
    """Targets of the repair of one cut, made by :func:`~lightning_prune.compensation.collect_targets`.

    Attributes:
        settings: with which it was called.
        num_images: number of images.
        calls: layer -> one entry for each of its calls.
        outputs: of the dense network, without those whose size depends on values.
        left_alone: layer -> why it is not repaired.
        judges: calls of layers that judge the repair in place of the outputs, where sizes of these depend on values.

    Example:
        >>> import copy
        >>> from torch import nn
        >>> from lightning_prune import prune_, trace
        >>> from lightning_prune.compensation import collect_targets
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> images = torch.rand(8, 3, 16, 16)
        >>> small = copy.deepcopy(net)
        >>> graph = trace(small, images[:1])
        >>> record = prune_(small, graph, graph.layers["0.weight"][:4])
        >>> targets = collect_targets(net, record.kept, [images])
        >>> targets.num_images, sorted(targets.calls)
        (8, ['0', '2'])
    """

    settings: CompensationSettings
    num_images: int = 0
    calls: dict[str, list[CallTargets]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    judges: list[CallKey] = field(default_factory=list)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type for regressions of a weight of this type."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
