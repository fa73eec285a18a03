"""Rules of fake quantisation, with one scale or one per channel."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.tracing.calls import OperatorCall
from lightning_prune.tracing.rules.registry import rule, same_labels
from lightning_prune.tracing.tracker import Tracker

aten = torch.ops.aten

rule(
    aten.fake_quantize_per_tensor_affine, aten.fake_quantize_per_tensor_affine_cachemask,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams, aten._fake_quantize_learnable_per_tensor_affine,
)(same_labels)  # fmt: skip


@rule(
    aten.fake_quantize_per_channel_affine, aten.fake_quantize_per_channel_affine_cachemask,
    aten._fake_quantize_learnable_per_channel_affine,
)  # fmt: skip
def per_channel(call: OperatorCall, tracker: Tracker) -> None:
    """Tie scales and zero points to the channels along the axis."""
    _tie_to_axis(call, call.arg("axis"), call.args[1:3], tracker)


@rule(aten.fused_moving_avg_obs_fake_quant, aten._fused_moving_avg_obs_fq_helper)
def observed(call: OperatorCall, tracker: Tracker) -> None:
    """Tie observed extremes, scales and zero points to the channels along the axis, if there is one per channel."""
    if call.arg("per_row_fake_quant"):
        _tie_to_axis(call, call.arg("ch_axis"), call.args[3:7], tracker)
    else:
        same_labels(call, tracker)


def _tie_to_axis(call: OperatorCall, axis: int, parameters: tuple[Tensor, ...], tracker: Tracker) -> None:
    for parameter in parameters:
        tracker.tie(tracker.along(call.args[0], axis), tracker.along(parameter, 0))
    same_labels(call, tracker)
