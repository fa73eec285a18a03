"""Folders of pruned networks: written, loaded in another process, pushed to a local hub, and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightning_prune import (
    L2,
    ModelCard,
    RecordError,
    load_pretrained,
    load_pruned,
    prune_,
    push_pretrained,
    save_pretrained,
    select,
    trace,
)
from lightning_prune.segmentation import UNet
from lightning_prune.serialization.factories import build_network, describe_factory
from tests.support.hub_server import running_hub

SMALL = partial(UNet, in_channels=1, classes=3, width=8)


def cut(net: nn.Module, shape=(1, 1, 16, 16)):
    net.eval()
    graph = trace(net, torch.zeros(shape))
    prune_(net, graph, select(graph, L2()(graph, net), budget={"macs": 0.5}).remove)
    return net


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return cut(SMALL())


@pytest.fixture
def folder(net, tmp_path):
    card = ModelCard(
        "small-unet", "mit", "segmentation", "slices", {"miou": 0.87654}, ("a", "b", "c"), (1, 1, 16, 16)
    )
    return save_pretrained(net, tmp_path / "small", factory=SMALL, card=card)


IMAGE = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_folder_loads_with_the_factory_and_by_the_name_in_it(net, folder):
    for loaded in (load_pretrained(folder), load_pruned(SMALL(), folder), load_pruned(SMALL(), str(folder))):
        assert torch.equal(loaded.eval()(IMAGE), net(IMAGE))
    assert sum(p.numel() for p in net.parameters()) < 0.9 * sum(p.numel() for p in SMALL().parameters())


def test_a_new_process_loads_it_without_anything_else(net, folder, tmp_path):
    code = (
        "import torch; from lightning_prune import load_pretrained; "
        f"net = load_pretrained({str(folder)!r}); torch.save(net(torch.load({str(tmp_path / 'x.pt')!r})), "
        f"{str(tmp_path / 'y.pt')!r})"
    )
    torch.save(IMAGE, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, timeout=600)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), net(IMAGE), atol=1e-5, rtol=1e-5)


def test_weights_are_plain_safetensors_and_readable_by_others(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "head.weight" in file.keys()  # noqa: SIM118 - not a mapping
    assert (folder / "model.safetensors").stat().st_mode == (folder / "README.md").stat().st_mode


def test_the_head_of_the_card_is_what_the_hub_expects(folder):
    hub = pytest.importorskip("huggingface_hub", reason="pip install lightning-prune[hub]")
    data = hub.ModelCard.load(folder / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "mit",
        "lightning-prune",
        "image-segmentation",
    )
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("mean_iou", 0.8765, "slices")


def test_the_card_says_how_small_how_to_load_and_which_files(folder):
    card = (folder / "README.md").read_text()
    share = json.loads((folder / "config.json").read_text())["shares"]["params"]
    for part in (
        f"{100 * share:.1f} % of the parameters",
        "load_pretrained(",
        "load_pruned(",
        "`record.json`",
        "a, b, c",
    ):
        assert part in card


def test_networks_of_other_packages_are_built_by_their_names():
    timm = pytest.importorskip("timm")
    import segmentation_models_pytorch as smp
    import torchvision

    factories = [
        (partial(torchvision.models.resnet18, num_classes=5), "torchvision.models.resnet18"),
        (partial(timm.create_model, "resnet18", num_classes=4), "timm.create_model"),
        (partial(smp.Unet, "resnet18", encoder_weights=None, classes=2), "segmentation_models_pytorch.Unet"),
    ]
    for factory, name in factories:
        described = json.loads(json.dumps(describe_factory(factory)))
        assert described["_target_"] == name
        expected = {key: tensor.shape for key, tensor in factory().state_dict().items()}
        assert {
            key: tensor.shape for key, tensor in build_network(described).state_dict().items()
        } == expected


def test_no_weights_are_downloaded():
    import segmentation_models_pytorch as smp

    described = {
        "_target_": "segmentation_models_pytorch.Unet",
        "encoder_name": "resnet18",
        "encoder_weights": "imagenet",
    }
    assert isinstance(build_network(described), smp.Unet)
    build_network({"_target_": "torchvision.models.resnet18", "weights": "IMAGENET1K_V1"})


@pytest.mark.parametrize(
    "description",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1},
        {"_target_": "timm.models.load_checkpoint", "model": "x"},
        {"_target_": "timm.create_model", "model_name": "resnet18", "checkpoint_path": "x.pth"},
        {"_target_": "timm.create_model", "model_name": "hf-hub:some/one"},
        {"_target_": "torchvision.models.get_weight", "name": "x"},
        {"_target_": "lightning_prune.segmentation.SegmentationModule", "net": None, "num_classes": 2},
        {"_target_": "segmentation_models_pytorch.Unet", "encoder_name": {"_target_": "os.getcwd"}},
        {"_target_": 3},
        None,
    ],
)
def test_only_networks_are_built_on_the_word_of_a_file(description):
    with pytest.raises(RecordError, match="load_pruned"):
        build_network(description)


def test_factories_without_a_name_are_refused_and_nothing_is_written(net, tmp_path):
    for factory in (lambda: SMALL(), partial(UNet, in_channels=nn.Linear(1, 1))):
        with pytest.raises(ValueError, match=r"no name that can be imported|cannot be written to a file"):
            save_pretrained(net, tmp_path / "new", factory=factory)
    assert not (tmp_path / "new").exists()


def test_a_folder_without_factory_says_what_to_do(net, tmp_path):
    save_pretrained(net, tmp_path)
    with pytest.raises(RecordError, match=r"load_pruned\(network, folder\)"):
        load_pretrained(tmp_path)
    assert torch.equal(load_pruned(SMALL(), tmp_path).eval()(IMAGE), net(IMAGE))


def test_incomplete_and_damaged_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor net.pt"):
        load_pruned(SMALL(), tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repository"):
        load_pretrained(tmp_path / "nowhere")
    (folder / "config.json").write_text("{")
    with pytest.raises(RecordError, match=r"config.json is damaged"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"lacks config.json"):
        push_pretrained(folder, "me/small")


def test_a_folder_goes_to_the_hub_and_comes_back(net, folder, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="pip install lightning-prune[hub]")
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    (folder / "model.onnx").write_bytes(b"onnx")
    with running_hub() as hub:
        options = {"token": "hf_secret", "endpoint": hub.address}
        address = push_pretrained(folder, "me/small-unet", message="First", **options)
        assert address == f"{hub.address}/me/small-unet"
        assert hub.private == {"me/small-unet": True}
        assert hub.files["me/small-unet"] == {p.name: p.read_bytes() for p in folder.iterdir()}
        assert hub.messages == ["First"]
        assert set(hub.tokens) == {"Bearer hf_secret"}
        loaded = load_pretrained("me/small-unet", **options)
    assert torch.equal(loaded(IMAGE), net(IMAGE))
    with pytest.raises(ValueError, match="user/name"):
        push_pretrained(folder, "small-unet")


def test_without_the_package_of_the_hub_an_error_names_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"lightning-prune\[hub\]"):
        push_pretrained(folder, "me/small-unet")
    with pytest.raises(ImportError, match=r"lightning-prune\[hub\]"):
        load_pretrained("me/small-unet")
