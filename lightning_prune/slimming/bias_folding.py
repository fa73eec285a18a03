"""Fold the constant output of removed channels into the bias or batch norm of the next layer.

The mean contribution of the removed inputs to each layer, measured by :func:`~lightning_prune.slimming.shifts`, is
added to the layer's bias, or subtracted from the running mean of the batch norm that follows. A layer with neither
cannot be compensated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.compensation.calibration import Calibration, output_change
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.slimming.contributions import Shift, forward_in_eval_mode, shifts
from lightning_prune.tracing.calls import tensors_in
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.distributed import broadcast
from lightning_prune.utils.example_inputs import Example, num_samples
from lightning_prune.utils.modules import stored_tensor

__all__ = ["Folded", "MeasuredShifts", "fold_", "outputs", "relative_change"]


@dataclass(frozen=True)
class Folded:
    """Numbers of layers that were compensated exactly, by the mean of a varying contribution, or not at all."""

    exact: int = 0
    approximate: int = 0
    lost: int = 0


def fold_(model: nn.Module, measured: list[Shift]) -> Folded:
    """Add shifts that were measured before a cut to the biases and running means of ``model``, after the cut.

    Args:
        model: the network after the cut; it is changed.
        measured: what :func:`~lightning_prune.slimming.shifts` returned before it.

    Returns:
        How many layers were compensated exactly, by a mean, or not at all, for lack of a bias or batch norm.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 1))
        >>> _ = nn.init.zeros_(layer[0].bias)
        >>> fold_(layer, [Shift("0", torch.tensor([0.5]), True, None)]), layer[0].bias.data
        (Folded(exact=1, approximate=0, lost=0), tensor([0.5000]))
    """
    counts = {"exact": 0, "approximate": 0, "lost": 0}
    for shift in measured:
        destination = _destination(model, shift)
        if destination is None:
            counts["lost"] += bool(shift.values.any())
            continue
        tensor, sign = destination
        tensor.data += sign * shift.values.to(tensor)
        counts["exact" if shift.exact else "approximate"] += 1
    return Folded(**counts)


def _destination(model: nn.Module, shift: Shift) -> tuple[Tensor, int] | None:
    """Return the tensor to which the shift is added, and with which sign; None if there is none."""
    bias = stored_tensor(model.get_submodule(shift.layer), "bias")
    if bias is not None:
        return bias, 1
    return (model.get_submodule(shift.norm).get_buffer("running_mean"), -1) if shift.norm else None


@torch.no_grad()
def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Return the floating-point outputs of ``model`` in eval mode, as float32."""
    tensors = tensors_in(forward_in_eval_mode(model, example))
    return [tensor.float() for tensor in tensors if tensor.is_floating_point()]


def relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    """Return ``||after - before|| / ||before||`` over all outputs together; NaN if there are none to compare.

    Outputs whose sizes depend on values, such as the boxes of a detector, may differ in number.

    Example:
        >>> relative_change([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 3.0])])
        0.2
    """
    if not before or [x.shape for x in before] != [x.shape for x in after]:
        return math.nan
    change = float(sum((a - b).double().square().sum() for b, a in zip(before, after, strict=True)))
    size = float(sum(b.double().square().sum() for b in before))
    return float((change / size) ** 0.5) if size > 0 else float(change > 0)


class MeasuredShifts:
    """The shifts that a cut removes from a network and its averaged copies, measured on one batch.

    Args:
        networks: the network itself, then its averaged copies.
        graph: the graph of the network before the cut.
        scales: see :func:`shifts`.
        remove: the units to remove.
        example: a batch; if it is None, nothing is folded.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        graph: ChannelGraph,
        scales: Mapping[str, Units],
        remove: Units,
        example: Example | None,
    ) -> None:
        self.networks, self.graph, self.remove, self.example = list(networks), graph, remove, example
        self.before = outputs(networks[0], example) if example else []
        measured = [
            shifts(network, graph, scales, remove, example) if example else [] for network in networks
        ]
        self.shifts = broadcast(measured)  # each process has another batch, but all must fold the same values

    def kept_channels(self, name: str, value: Tensor, removed: Units) -> Tensor:
        """Return the entries of the kept channels of ``value``, which has one entry per channel of ``name``."""
        kept = self.graph.kept(removed)[self.graph.bindings[name][0]]
        return value[torch.from_numpy(kept).to(value.device)]

    def fold_(self, removed: Units) -> Folded:
        """Fold the shifts into the networks after the cut; fold nothing if other units were removed."""
        if not np.array_equal(np.sort(removed), np.sort(self.remove)):
            return Folded(lost=len(self.shifts[0]))
        folded = [
            fold_(network, measured) for network, measured in zip(self.networks, self.shifts, strict=True)
        ]
        return folded[0]

    def changes(self) -> tuple[float, float]:
        """Return by how much the cut has changed the network's outputs; NaN if they cannot be compared.

        Returns:
            The :func:`relative_change`; and the squared distance as a share of the variance, as a repair measures it.
        """
        if not self.example:
            return math.nan, math.nan
        after = outputs(self.networks[0], self.example)
        images = Calibration(self.example, num_samples(self.example), num_fit=0)
        return relative_change(self.before, after), output_change(self.before, after, images)
