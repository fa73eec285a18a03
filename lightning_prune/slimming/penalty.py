"""The sparsity penalty on the scales of norms, weighted by the cost of each channel: ``rho * sum p |gamma|``.

Network slimming (Liu et al., ICCV 2017) with the costs of AtomNAS (Mei et al., ICLR 2020): a channel that costs twice
the mean gets a penalty gradient of twice the size. The gradient, ``rho * p * sign(gamma)``, is added to ``.grad``
after the backward pass. So the loss of the training step does not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.criteria.base import Values
from lightning_prune.criteria.cost_aware import marginal_costs
from lightning_prune.criteria.reduction import norm_scales
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.selection.layer_patterns import check_patterns, matches_layer, names_and_containers
from lightning_prune.selection.prunable import removable_units
from lightning_prune.tracing.ids import Units

__all__ = ["Penalty", "channel_costs", "slimmable"]


def slimmable(
    graph: ChannelGraph, model: nn.Module, norms: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, Units]:
    """Return the norm scales that a penalty may push towards 0, with the unit of each channel.

    Args:
        graph: the graph of ``model``.
        model: the network; scales that are frozen are left out.
        norms: names or globs of norms, or of modules that contain them; all norms if empty.
        exclude: names or globs of layers whose filters must stay.

    Returns:
        Qualified name of the scale -> unit of each channel, shape (channels,); -1 for channels that must stay.

    Raises:
        ValueError: a name matches no norm, or no norm has a channel that may be removed.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        >>> slimmable(trace(net, torch.zeros(1, 1, 4, 4)), net)
        {'1.weight': array([0, 1, 2])}
    """
    patterns = [norms] if isinstance(norms, str) else list(norms)
    scales = norm_scales(graph, model)
    check_patterns(patterns, names_and_containers(scales), "norm")
    removable = removable_units(graph, exclude)
    masked = {
        name: np.where(np.isin(units, removable), units, -1)
        for name, units in scales.items()
        if model.get_parameter(name).requires_grad
        and (not patterns or any(matches_layer(pattern, name) for pattern in patterns))
    }
    slimmed = {name: units for name, units in masked.items() if (units >= 0).any()}
    if not slimmed:
        raise ValueError(_explain_no_norm(patterns, scales))
    return slimmed


def _explain_no_norm(patterns: Sequence[str], scales: Mapping[str, Units]) -> str:
    """Return why there is no norm to slim."""
    if not scales:
        return (
            "no norm to slim: no filter of this network passes through a norm with a scale; use "
            "FilterPruningCallback"
        )
    which = f"norms={patterns}" if patterns else f"the {len(scales)} norms"
    return (
        f"no norm to slim: {which} have only channels that must stay, or are frozen; see graph.explain(layer)"
    )


def channel_costs(graph: ChannelGraph, scales: Mapping[str, Units], by: str = "macs") -> dict[str, Values]:
    """Return the cost ``p`` of each channel, as a multiple of the mean over all slimmed channels.

    The cost of a channel is the exact decrease of the resource when its unit alone is removed. A unit with several
    scales (a residual stream) divides its cost among them. Where all channels of a layer cost the same, this is the
    ``(MACs_l / C_l) / (sum MACs / sum C)`` of AtomNAS.

    Args:
        graph: the graph, with its resources.
        scales: see :func:`slimmable`.
        by: ``"macs"``, ``"params"``, or another resource of the graph.

    Returns:
        Name of the scale -> costs, shape (channels,); 0 for channels that must stay.

    Raises:
        ValueError: the resource is unknown.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3))
        >>> graph = trace(net, torch.zeros(2, 1, 8, 8))
        >>> channel_costs(graph, {"1.weight": graph.layers["0.weight"]})["1.weight"].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    # A measured resource may even grow when a channel is removed; no channel is rewarded for that.
    unit_costs = np.maximum(marginal_costs(graph, by), 0.0)
    units_of_channels = np.concatenate(list(scales.values()))
    slimmed = units_of_channels[units_of_channels >= 0]
    scales_per_unit = np.maximum(np.bincount(slimmed, minlength=graph.num_units), 1)
    # A unit with several scales has one cost: each scale gets its part, so that the sum is the same.
    costs = np.append(unit_costs / scales_per_unit, 0.0)  # index -1, of channels that must stay, has cost 0
    mean = costs[units_of_channels].sum() / max(len(slimmed), 1)
    return {name: costs[units] / (mean if mean > 0 else 1.0) for name, units in scales.items()}


@dataclass(frozen=True)
class Penalty:
    """The penalty ``sum p |gamma|`` over the slimmed scales.

    Attributes:
        weights: qualified name of a scale -> ``p`` of each channel, a tensor like the scale.
        scales: qualified name of a scale -> the parameter.

    Example:
        >>> norm = nn.BatchNorm2d(2)
        >>> penalty = Penalty({"weight": torch.tensor([0.5, 1.5])}, {"weight": norm.weight})
        >>> penalty.add_(rho=0.5)
        >>> penalty.value().item(), norm.weight.grad
        (2.0, tensor([0.2500, 0.7500]))
    """

    weights: Mapping[str, Tensor]
    scales: Mapping[str, nn.Parameter]

    @classmethod
    def of(cls, graph: ChannelGraph, model: nn.Module, scales: Mapping[str, Units], by: str) -> Penalty:
        """Return the penalty with the present costs of the network.

        Args:
            graph: the graph of ``model``.
            model: the network that holds the scales.
            scales: see :func:`slimmable`.
            by: the resource that weights the channels, see :func:`channel_costs`.
        """
        parameters = {name: model.get_parameter(name) for name in scales}
        costs = channel_costs(graph, scales, by)
        weights = {name: torch.from_numpy(costs[name]).to(scale) for name, scale in parameters.items()}
        return cls(weights, parameters)

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return the penalty without ``rho``, a scalar on the CPU."""
        return torch.stack(
            [(p * self.scales[name].abs()).sum().float().cpu() for name, p in self.weights.items()]
        ).sum()

    @torch.no_grad()
    def add_(self, rho: float, parameters: Iterable[Tensor] | None = None) -> None:
        """Add the gradient of ``rho`` times the penalty to ``.grad``.

        Call it after the gradients are unscaled and before the optimizer steps. Scales that are frozen at the moment
        are not changed. The gradient at ``gamma = 0`` is 0, as autograd's gradient of ``|gamma|``.

        Args:
            rho: the factor of the penalty.
            parameters: change the gradients of these parameters only; None: of all slimmed scales.
        """
        selected = None if parameters is None else {id(parameter) for parameter in parameters}
        for name, scale in self.scales.items():
            if scale.requires_grad and (selected is None or id(scale) in selected):
                if scale.grad is None:  # no loss term reached the scale in this step
                    scale.grad = torch.zeros_like(scale)
                scale.grad += (rho * self.weights[name] * scale.sign()).to(scale.grad)
