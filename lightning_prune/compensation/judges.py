"""Compare the last layers of two networks that can be compared, in place of outputs whose sizes depend on values."""

from __future__ import annotations

import math
from collections import Counter

from torch import nn

from lightning_prune.compensation.calibration import Calibration, outputs_of, undisturbed
from lightning_prune.compensation.calls import LayerCall, observed_calls
from lightning_prune.compensation.im2col import output_rows, position_shape
from lightning_prune.compensation.layers import find_layers
from lightning_prune.compensation.target_records import CallTargets, Targets, compute_dtype
from lightning_prune.compensation.value_watch import CallKey

__all__ = ["judged_change"]


def judged_change(model: nn.Module, targets: Targets, images: Calibration) -> float:
    """Return the squared distance of the judging layers from the dense ones, as a share of their variance.

    Args:
        model: the smaller network.
        targets: of the dense network, with at least one judging call.
        images: the held-out ones of which are compared, at sampled positions.

    Returns:
        The mean over all calls that judge; NaN if the network does not make one of them, or with another shape.
    """
    changes: dict[CallKey, float] = {}
    counts: Counter[str] = Counter()

    def observe(call: LayerCall) -> bool:
        key = call.layer.name, counts[call.layer.name]
        counts[call.layer.name] += 1
        if key in judges:
            changes[key] = _change(call, targets.calls[key[0]][key[1]])
        return False

    judges = set(targets.judges)
    names = {name for name, _ in judges}
    layers = [layer for layer in find_layers(model)[0] if layer.name in names]
    with undisturbed(model), observed_calls(model, layers, observe):
        outputs_of(model, images)
    return sum(changes.values()) / len(changes) if len(changes) == len(judges) else math.nan


def _change(call: LayerCall, dense: CallTargets) -> float:
    """Return the distance of one call's held-out rows from the dense ones, as a share of their variance."""
    layer, held = call.layer, dense.held
    if position_shape(layer, call.output) != dense.shape:
        return math.nan
    rows = output_rows(layer, call.output, held.positions, compute_dtype(layer.weight))
    if rows.shape != held.rows.shape:
        return math.nan
    variance = (held.rows - held.rows.mean(0)).double().square().sum().clamp(min=1e-12)
    return float((rows - held.rows).double().square().sum() / variance)
