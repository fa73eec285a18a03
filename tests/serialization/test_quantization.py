"""INT8 export: what is quantised, how far the outputs are, what the file holds, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import L2, ExportError, export_int8, prune_, select, trace
from lightning_prune.segmentation import UNet
from lightning_prune.serialization.export import exported_record

onnx = pytest.importorskip("onnx", reason="pip install lightning-prune[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install lightning-prune[export]")

IMAGES = [torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(n)) for n in range(8)]


@pytest.fixture(scope="module")
def pruned():
    torch.manual_seed(0)
    net = UNet(in_channels=1, classes=3, width=8).eval()
    graph = trace(net, IMAGES[0])
    return net, prune_(net, graph, select(graph, L2()(graph, net), budget={"macs": 0.5}).remove)


@pytest.fixture(scope="module")
def exported(pruned, tmp_path_factory):
    net, record = pruned
    path = tmp_path_factory.mktemp("int8") / "net.onnx"
    return path, export_int8(net, path, IMAGES, record)


def test_all_convolutions_run_in_int8_with_a_scale_per_channel(exported):
    path, result = exported
    model = onnx.load(path)
    convolutions = [node for node in model.graph.node if node.op_type.startswith("Conv")]
    assert sum(result.quantised.values()) == len(convolutions) > 10
    assert result.in_float == {}
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in convolutions:
        weight, scale, _ = producers[node.input[1]].input
        assert tensors[weight].dtype == np.int8
        axis = 0 if node.op_type == "Conv" else 1
        assert tensors[scale].shape == (tensors[weight].shape[axis],)


def test_outputs_are_close_and_the_difference_is_what_is_said(pruned, exported):
    path, result = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = np.concatenate([session.run(None, {name: image.numpy()})[0] for image in IMAGES])
    with torch.no_grad():
        expected = torch.cat([pruned[0](image) for image in IMAGES]).numpy()
    difference = np.sqrt(((outputs - expected) ** 2).mean() / (expected**2).mean())
    assert result.difference == pytest.approx(difference, rel=1e-3)
    assert 0 < difference < 0.2
    assert result.images == 8
    assert session.run(None, {name: torch.cat(IMAGES[:3]).numpy()})[0].shape[0] == 3


def test_the_file_is_small_holds_the_record_and_runs_without_this_package(pruned, exported, tmp_path):
    path, _ = exported
    net, record = pruned
    assert exported_record(path) == record
    parameters = sum(p.numel() for p in net.parameters())
    assert path.stat().st_size < 2 * parameters + 60_000  # four bytes each in floating point
    code = (
        "import sys, onnxruntime, numpy as np; sys.modules['lightning_prune'] = sys.modules['torch'] = None; "
        f"s = onnxruntime.InferenceSession({str(path)!r}); "
        "print(s.run(None, {s.get_inputs()[0].name: np.zeros((2, 1, 16, 16), np.float32)})[0].shape)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=600, capture_output=True, text=True
    )
    assert "(2, 3, 16, 16)" in shown.stdout


def test_matrix_products_are_quantised_and_network_and_mode_stay(tmp_path):
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = export_int8(net, tmp_path / "net.onnx", [torch.randn(1, 8) for _ in range(4)])
    assert sum(result.quantised.values()) == 2
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_network_without_operators_in_int8_is_refused_and_nothing_is_written(tmp_path):
    net = nn.Sequential(nn.AvgPool2d(2), nn.Softmax(1))
    with pytest.raises(
        ExportError, match=r"no operator of Sequential can be quantised.*export it without INT8"
    ):
        export_int8(net, tmp_path / "net.onnx", [torch.rand(1, 2, 8, 8)])
    with pytest.raises(ValueError, match="needs calibration inputs"):
        export_int8(nn.Conv2d(1, 1, 1), tmp_path / "net.onnx", [])
    with pytest.raises(ValueError, match=r"must end in .onnx"):
        export_int8(nn.Conv2d(1, 1, 1), tmp_path / "net.pt2", IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_not_finite_are_refused(tmp_path):
    net = nn.Conv2d(1, 1, 1)
    nn.init.constant_(net.weight, float("nan"))
    with pytest.raises(ExportError):
        export_int8(net, tmp_path / "net.onnx", IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_without_onnxruntime_an_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"lightning-prune\[export\]"):
        export_int8(nn.Conv2d(1, 1, 1), tmp_path / "net.onnx", IMAGES)
