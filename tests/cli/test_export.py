"""``lightning-prune export``: INT8 with its table, folders for the hub, and runs that lack something."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from lightning_prune import load_pretrained, load_pruned
from lightning_prune.cli.commands import run_command
from lightning_prune.cli.config import load_config
from lightning_prune.cli.main import main
from lightning_prune.segmentation import UNet
from tests.support.hub_server import running_hub

pytest.importorskip("onnxruntime", reason="pip install lightning-prune[export]")
pytestmark = pytest.mark.filterwarnings("ignore:.*", "error::UserWarning:lightning_prune")
DATA = ["data.size=32", "data.slices_per_axis=16", "data.axes=[axial]", "net=unet_ipad", "net.width=8"]
TRAINING = ["trainer=cpu", "trainer.max_epochs=2", "latency_runs=0", "logger=none", "table=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train a dense and a pruned network; return their folders."""
    pytest.importorskip("nilearn", reason="pip install lightning-prune[demo]")
    root = tmp_path_factory.mktemp("runs")
    for name, more in {"dense": ["prune=none"], "pruned": ["prune=l2", "prune.budget.macs=0.92"]}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                sys, "argv", ["lightning-prune", *DATA, *TRAINING, *more, f"hydra.run.dir={root / name}"]
            )
            main()
    return root


def export(*words: object) -> None:
    run_command("export", [str(word) for word in words])


def test_int8_is_compared_with_the_dense_and_the_pruned_network(runs, tmp_path, capsys):
    path = tmp_path / "small.onnx"
    export(
        runs / "pruned",
        path,
        "--int8",
        "--baseline",
        runs / "dense",
        "--images",
        4,
        "--json",
        tmp_path / "t.json",
    )
    shown, steps = capsys.readouterr()
    for step in ("reading 4 training images", "quantising", "measuring the latency of 3 networks", "testing"):
        assert step in steps
    content = json.loads((tmp_path / "t.json").read_text())
    networks = content["networks"]
    assert list(networks) == ["dense", "pruned", "pruned INT8"]
    for name in ("dense", "pruned"):
        summary = json.loads((runs / name / "summary.json").read_text())
        assert networks[name]["scores"]["miou"] == pytest.approx(summary["test"]["miou"], abs=2e-3)
    sizes = [network["bytes"] for network in networks.values()]
    assert sizes[1] > 2 * sizes[2] == 2 * path.stat().st_size
    assert content["int8"]["images"] == 4
    for part in ("| ONNX file", "| latency, 1 thread", "| test mIoU", "INT8: "):
        assert part in shown


def test_without_a_baseline_the_dense_network_has_no_score(runs, tmp_path, capsys):
    export(runs / "pruned", tmp_path / "net.onnx", "--int8", "--images", 2, "--json", "-")
    networks = json.loads(capsys.readouterr().out)["networks"]
    assert networks["dense"]["scores"] == {}
    assert set(networks["pruned"]["scores"]) >= {"miou", "iou_grey"}


def test_a_folder_for_the_hub_loads_by_itself_and_goes_up(runs, tmp_path, capsys):
    folder = tmp_path / "small-unet"
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_x")
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        export(runs / "pruned", folder, "--int8", "--images", 2, "--license", "mit", "--push", "me/brain")
        assert set(hub.files["me/brain"]) == {path.name for path in folder.iterdir()}
    assert f"uploaded to {hub.address}/me/brain" in capsys.readouterr().out
    net, image = load_pretrained(folder), torch.rand(1, 1, 32, 32)
    same = load_pruned(UNet(in_channels=1, classes=3, width=8), runs / "pruned").eval()
    assert torch.equal(net(image), same(image))
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "# brain\n" in card
    assert "pruned INT8" in card
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "model.int8.onnx",
        "model.onnx",
        "model.safetensors",
        "record.json",
    }


def broken(runs: Path, tmp_path: Path, name: str = "pruned") -> Path:
    return Path(shutil.copytree(runs / name, tmp_path / "broken"))


def test_a_run_without_weights_names_its_checkpoint(runs, tmp_path):
    run = broken(runs, tmp_path)
    (run / "net.pt").unlink()
    with pytest.raises(SystemExit, match=r"there is no .*net.pt.*--weights .*checkpoints/last.ckpt"):
        export(run)
    export(run, "--weights", run / "checkpoints" / "last.ckpt")
    assert (run / "net.onnx").is_file()


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(SystemExit, match="holds no run"):
        export(tmp_path, "--int8")


def test_a_run_whose_data_are_gone(runs, tmp_path):
    run = broken(runs, tmp_path)
    config = load_config(run)
    config.data = {"_target_": "lightning_prune.data.FolderDataModule", "root": "gone", "num_classes": 3}
    from omegaconf import OmegaConf

    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    with pytest.raises(
        SystemExit, match=r"INT8 needs training images, and those of .* cannot be read: there is no"
    ):
        export(run, "--int8")
    config.data = None
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    with pytest.raises(SystemExit, match="names no data"):
        export(run, "--int8")


def test_a_baseline_that_is_pruned_is_refused(runs, tmp_path):
    with pytest.raises(SystemExit, match=r"is pruned: --baseline takes the run of the dense network"):
        export(runs / "pruned", tmp_path / "a.onnx", "--int8", "--images", 2, "--baseline", runs / "pruned")


def test_without_onnxruntime(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit, match=r"pip install '?lightning-prune\[export\]"):
        export(runs / "pruned", tmp_path / "a.onnx", "--int8")
