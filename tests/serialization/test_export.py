"""Tests of export: the files compute what the pruned networks do, and contain the record."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from segmentation_models_pytorch import Unet
from torch import Tensor, nn

from lightning_prune import IPAD, PruningRecord, RecordError, prune_, save_pruned, select, trace
from lightning_prune.cli.main import main
from lightning_prune.reporting.run_folder import save_net
from lightning_prune.serialization import export as module
from lightning_prune.serialization.export import ExportError, export, exported_record
from lightning_prune.testing import randomise_
from tests.support.nets import Net, Small, assert_same, random_units, state

X = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(3))
ENDINGS = ["onnx", "pt2"]


def small() -> tuple[nn.Module, PruningRecord]:
    model = randomise_(Small())
    graph = trace(model, X)
    return model, prune_(model, graph, random_units(graph))


def outputs(path: Path, x: Tensor) -> np.ndarray:
    """Outputs of an exported file, computed without lightning_prune."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x).detach().numpy()
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_file_computes_the_same_for_any_batch_and_contains_the_record(
    ending: str, tmp_path: Path
) -> None:
    model, record = small()
    before, path = state(model), tmp_path / "new" / f"net.{ending}"
    assert export(model, X[:1], path, record) < 1e-5
    assert_same({**state(model), "random": None}, {**before, "random": None})
    model.eval()
    for number in (1, 2, 5):
        np.testing.assert_allclose(
            outputs(path, X[:number]), model(X[:number]).detach(), rtol=1e-4, atol=1e-4
        )
    assert exported_record(path) == record
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_pruned_unet_as_onnx(tmp_path: Path) -> None:
    net = Unet(
        "resnet18",
        encoder_weights=None,
        in_channels=1,
        classes=3,
        encoder_depth=3,
        decoder_channels=(32, 16, 8),
    )
    x = torch.randn(1, 1, 32, 32)
    graph = trace(net, x)
    record = prune_(net, graph, select(graph, IPAD(omega=1.0)(graph, net, {}), budget={"macs": 0.4}))
    assert export(net, x, tmp_path / "net.onnx", record) < 1e-4
    weights = {entry.name: list(entry.dims) for entry in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert list(net.encoder.conv1.weight.shape) in weights.values()


@pytest.mark.parametrize("ending", ENDINGS)
def test_several_inputs_by_position_and_by_name(ending: str, tmp_path: Path) -> None:
    def forward(net: Any, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"out": net.conv(x) * scale[:, None, None, None], "mean": x.mean((1, 2, 3))}

    class Two(Net):
        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return forward(self, x, scale)

    net = Two(forward, conv=nn.Conv2d(3, 4, 3))
    assert export(net, (X[:1], torch.ones(1)), tmp_path / f"a.{ending}") < 1e-5
    assert export(net, {"x": X[:1], "scale": torch.ones(1)}, tmp_path / f"b.{ending}") < 1e-5
    assert exported_record(tmp_path / f"a.{ending}") is None


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_fixed_batch(ending: str, tmp_path: Path) -> None:
    net = Net(lambda net, x: net.linear(x.reshape(2, 27)), linear=nn.Linear(27, 2))
    assert export(net, torch.randn(2, 3, 3, 3), tmp_path / f"it.{ending}", dynamic_batch=False) < 1e-5


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_with_other_outputs_is_not_written(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"net.{ending}"
    path.write_text("as before")
    honest = module.WRITERS[f".{ending}"]

    def wrong(net: nn.Module, *rest: Any) -> Any:
        run = honest(net, *rest)
        return lambda *args, **kwargs: [x + 1 for x in run(*args, **kwargs)]

    monkeypatch.setitem(module.WRITERS, f".{ending}", wrong)
    with pytest.raises(ExportError, match="differ from the eager ones by"):
        export(small()[0], X, path)
    assert path.read_text() == "as before"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_nan_outputs_are_refused(tmp_path: Path) -> None:
    net = Net(lambda net, x: net.conv(x) * float("nan"), conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(ExportError, match="by nan"):
        export(net, X, tmp_path / "net.pt2")


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.onnx or \.pt2"):
        export(small()[0], X, tmp_path / "net.pt")
    with pytest.raises(RecordError, match="has no pruning record"):
        exported_record(tmp_path / "net.pt")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), tmp_path / "empty.onnx")
    with pytest.raises(RecordError, match="has no pruning record"):
        exported_record(tmp_path / "empty.onnx")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install lightning-prune\[export\]"):
        export(small()[0], X, tmp_path / "net.onnx")


# -- the command -----------------------------------------------------------------------------------------------

CONFIG = """
net: {_target_: tests.support.nets.Small}
module: {example_input_shape: [1, 3, 12, 12]}
"""


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, nn.Module, PruningRecord]:
    """A folder like that of a run."""
    model, record = small()
    (tmp_path / "config.yaml").write_text(CONFIG)
    save_net(tmp_path / "net.pt", model, record)
    save_pruned(model, record, tmp_path / "best.safetensors")
    return tmp_path, model.eval(), record


def command(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-prune", "export", *map(str, words)])
    main()


def test_the_command_exports_a_run(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder, model, record = run
    command(monkeypatch, folder)
    assert "net.onnx: " in capsys.readouterr().out
    np.testing.assert_allclose(outputs(folder / "net.onnx", X), model(X).detach(), rtol=1e-4, atol=1e-4)
    assert exported_record(folder / "net.onnx") == record
    command(monkeypatch, folder, folder / "best.pt2", "--weights", folder / "best.safetensors")
    np.testing.assert_allclose(outputs(folder / "best.pt2", X), model(X).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["nowhere"], "nowhere/config.yaml"), ([".", "net.txt"], "must end in"), ([".", "--no"], "--no")],
)
def test_wrong_arguments_end_with_a_message_without_traceback(
    run: Any, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(run[0])
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *words)
    assert message in f"{ended.value} {capsys.readouterr().err}"
