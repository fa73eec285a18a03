"""Latency tables of ONNX Runtime: what it can run, and where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import LatencyTable, trace
from lightning_prune.latency.profiler import measure_curves

onnxruntime = pytest.importorskip("onnxruntime")


class Upsampling(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](F.interpolate(self[0](x), scale_factor=2, mode="nearest"))


def test_interpolation_by_a_factor_is_measured():
    table = LatencyTable(execution="onnx", threads=1, cuts=0)
    measured = table.build(trace(Upsampling().eval(), torch.rand(1, 3, 8, 8)))
    assert any("upsample" in signature for signature in measured.entries)


def test_a_device_that_onnxruntime_does_not_run_on_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    table = LatencyTable(execution="onnx", device="cuda", threads=1)
    with pytest.raises(
        ValueError, match=r"no CUDAExecutionProvider .* install onnxruntime-gpu, or .*device='cpu'"
    ):
        measure_curves([], table.place)
