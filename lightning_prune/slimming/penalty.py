"""A penalty on the scales of norms that pushes expensive channels harder: ``rho * sum p |gamma|`` (level 3).

Network slimming (Liu et al., ICCV 2017) with the costs of AtomNAS (Mei et al., ICLR 2020): a channel that costs
twice the mean is pushed with twice the force. Its gradient, ``rho * p * sign(gamma)``, is added to what training
left in ``.grad``, so that the loss, and who computes it, stay as they are.
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
    """The scales that are to be slimmed, by qualified name -> unit of each channel, -1 for those that must stay.

    Args:
        graph: of ``model``.
        model: its norms' scales are looked at; frozen ones, which no gradient moves, are left out.
        norms: names or globs of norms, or of what holds them; all if there are none.
        exclude: of layers whose filters stay.

    Raises:
        ValueError: a name matches no norm, or none has a channel that may go.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        >>> slimmable(trace(net, torch.zeros(1, 1, 4, 4)), net)
        {'1.weight': array([0, 1, 2])}
    """
    patterns = [norms] if isinstance(norms, str) else list(norms)
    scales = norm_scales(graph, model)
    check_patterns(patterns, names_and_containers(scales), "norm")
    may_go = removable_units(graph, exclude)
    found = {
        name: np.where(np.isin(units, may_go), units, -1)
        for name, units in scales.items()
        if model.get_parameter(name).requires_grad
        and (not patterns or any(matches_layer(p, name) for p in patterns))
    }
    found = {name: units for name, units in found.items() if (units >= 0).any()}
    if not found:
        raise ValueError(_nothing(patterns, scales))
    return found


def _nothing(patterns: Sequence[str], scales: Mapping[str, Units]) -> str:
    if not scales:
        return (
            "no norm to slim: no filter of this network meets a norm with a scale; use FilterPruningCallback"
        )
    which = f"norms={patterns}" if patterns else f"the {len(scales)} norms"
    return (
        f"no norm to slim: {which} have only channels that must stay, or are frozen; see graph.explain(layer)"
    )


def channel_costs(graph: ChannelGraph, scales: Mapping[str, Units], by: str = "macs") -> dict[str, Values]:
    """``p``: what each channel costs as a multiple of the mean over all that are slimmed; 0 for those that stay.

    The cost of a channel is exact: what goes if its unit alone goes. A unit with several scales (a residual stream)
    divides it among them. Where all channels of a layer cost the same, this is AtomNAS's
    ``(MACs_l / C_l) / (sum MACs / sum C)``.

    Args:
        graph: knows the costs.
        scales: see :func:`slimmable`.
        by: ``"macs"``, ``"params"``, or any other resource that the graph counts.

    Raises:
        ValueError: the resource is unknown.
    """
    cost = np.maximum(marginal_costs(graph, by), 0.0)  # measured ones may fall where channels are added
    entries = np.concatenate(list(scales.values()))
    times = np.maximum(np.bincount(entries[entries >= 0], minlength=graph.num_units), 1)
    each = np.append(cost / times, 0.0)  # the last one is for those that stay, -1
    mean = each[entries].sum() / max((entries >= 0).sum(), 1)
    return {name: each[units] / (mean if mean > 0 else 1.0) for name, units in scales.items()}


@dataclass(frozen=True)
class Penalty:
    """``sum p |gamma|`` over the scales that are slimmed.

    Attributes:
        weights: qualified name of a scale -> ``p`` of each channel, like the scale.
        scales: the scales themselves.

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
        """The penalty with the costs of the network as it is."""
        held = {name: model.get_parameter(name) for name in scales}
        costs = channel_costs(graph, scales, by)
        return cls({name: torch.from_numpy(costs[name]).to(scale) for name, scale in held.items()}, held)

    @torch.no_grad()
    def value(self) -> Tensor:
        """The penalty without ``rho``, a scalar."""
        return torch.stack(
            [(p * self.scales[name].abs()).sum().float().cpu() for name, p in self.weights.items()]
        ).sum()

    @torch.no_grad()
    def add_(self, rho: float, parameters: Iterable[Tensor] | None = None) -> None:
        """Add the gradient of ``rho`` times the penalty to ``.grad``, of ``parameters`` only, if given.

        Before the optimizer steps, once the gradients are unscaled. What is frozen meanwhile stays. Autograd's own of
        ``|gamma|`` at 0 is 0, and so is this.
        """
        known = None if parameters is None else {id(parameter) for parameter in parameters}
        for name, scale in self.scales.items():
            if scale.requires_grad and (known is None or id(scale) in known):
                if scale.grad is None:
                    scale.grad = torch.zeros_like(scale)
                scale.grad += (rho * self.weights[name] * scale.sign()).to(scale.grad)
