"""Targets that several cuts of the same network share: collected once for all filters, and narrowed to each cut."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_prune.compensation.layers import Kept, find_layers, kept_filters
from lightning_prune.compensation.target_records import CallTargets, SampledRows, Targets

__all__ = ["narrowed_targets"]


def narrowed_targets(
    targets: Targets, model: nn.Module, kept: Kept, device: torch.device | None = None
) -> Targets:
    """Return what :func:`~lightning_prune.compensation.collect_targets` would give for one of several cuts.

    Args:
        targets: collected without a cut, ``collect_targets(model, {}, batches)``.
        model: the dense network; its values do not matter.
        kept: tensor -> dimension -> indices that survive the cut.
        device: of the returned tensors; None: the present one.

    Example:
        >>> from lightning_prune.compensation.targets import collect_targets
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1))
        >>> targets = collect_targets(net, {}, [torch.rand(8, 1, 6, 6)])
        >>> narrow = narrowed_targets(targets, net, {"0.weight": {0: [1, 3]}})
        >>> targets.calls["0"][0].fit.rows.shape[1], narrow.calls["0"][0].fit.rows.shape[1]
        (4, 2)
    """
    layers = {layer.name: layer for layer in find_layers(model)[0]}
    calls = {
        name: [_narrowed(call, kept_filters(layers[name], kept), device) for call in calls]
        for name, calls in targets.calls.items()
    }
    outputs = [output.to(device) for output in targets.outputs]
    return replace(targets, calls=calls, outputs=outputs, left_alone=dict(targets.left_alone))


def _narrowed(call: CallTargets, filters: Tensor | None, device: torch.device | None) -> CallTargets:
    """Return the rows of one call at the surviving filters."""

    def rows(dense: Tensor) -> Tensor:
        return (dense if filters is None else dense[:, filters.to(dense.device)]).to(device)

    def sampled(dense: SampledRows) -> SampledRows:
        slack = None if dense.slack is None else rows(dense.slack)
        return SampledRows(dense.positions, rows(dense.rows), slack)

    sums = None if call.sums is None else (sampled(call.sums[0]), sampled(call.sums[1]))
    return replace(call, fit=sampled(call.fit), held=sampled(call.held), sums=sums)
