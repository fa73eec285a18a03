"""Tests of checksums and fingerprints: changes are refused by name, ``verify=False`` insists, old files load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_prune import PruningRecord, RecordError, load_pruned, prune_, save_pruned, trace
from lightning_prune.reporting.run_folder import Summary, load_net, save_net
from lightning_prune.serialization.integrity import fingerprint
from lightning_prune.serialization.torch_file import load_torch_file
from lightning_prune.testing import randomise_

X = torch.zeros(1, 3, 8, 8)


def build(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 1))
    return randomise_(net).eval()


@pytest.fixture
def pruned() -> tuple[nn.Sequential, PruningRecord]:
    net = build()
    graph = trace(net, X)
    return net, prune_(net, graph, graph.layers["0.weight"][:3])


def test_the_record_holds_the_fingerprint_of_the_dense_network(
    pruned: tuple[nn.Sequential, PruningRecord], tmp_path: Path
) -> None:
    net, first = pruned
    assert first.dense == fingerprint(build())
    assert first.dense["0.weight"] == ["float32", [8, 3, 3, 3]]
    graph = trace(net, X)
    both = first.then(prune_(net, graph, graph.layers["0.weight"][:2]))
    assert both.dense == first.dense
    both.save(tmp_path / "record.json")
    assert PruningRecord.load(tmp_path / "record.json").dense == first.dense


def test_a_record_without_a_fingerprint_gets_one_with_the_next_cut(
    pruned: tuple[nn.Sequential, PruningRecord],
) -> None:
    net, record = pruned
    old = PruningRecord(record.kept, record.shapes, record.attributes)
    graph = trace(net, X)
    assert old.then(prune_(net, graph, graph.layers["0.weight"][:2])).dense == fingerprint(build())


def test_indices_that_were_changed_within_range_are_refused(
    pruned: tuple[nn.Sequential, PruningRecord], tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    pruned[1].save(path)
    content = json.loads(path.read_text())
    content["kept"]["0.weight"]["0"][0] = 0
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=r"record.json .* checksum does not match; pass verify=False"):
        PruningRecord.load(path)
    insisted = PruningRecord.load(path, verify=False)
    assert insisted.kept["0.weight"][0] == [0, *pruned[1].kept["0.weight"][0][1:]]
    del content["checksum"]
    path.write_text(json.dumps(content))
    assert PruningRecord.load(path).kept == insisted.kept


DENSE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another dtype": (
        lambda: build().double(),
        r"'0.weight' is float32 \[8, 3, 3, 3\] in the file, here float64",
    ),
    "a name more": (lambda: build().append(nn.Linear(1, 1)), "only here: '4.bias', '4.weight'"),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_record_is_not_applied_to_another_dense_network(
    pruned: tuple[nn.Sequential, PruningRecord], name: str
) -> None:
    make, message = DENSE[name]
    model = make()
    with pytest.raises(RecordError, match=message):
        pruned[1].apply_(model)
    assert model[0].out_channels == 8
    assert pruned[1].apply_(model, verify=False)[0].out_channels == 5


def rewritten(path: Path, change: Callable[[Any], Any]) -> Path:
    """Change the state_dict in a file, and write the file anew with all else as it was."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata)
    else:
        content = torch.load(path, weights_only=True)
        change(content["state_dict"])
        torch.save(content, path)
    return path


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_weights_that_were_changed_are_named(
    pruned: tuple[nn.Sequential, PruningRecord], tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    (save_net(path, *pruned) if name == "net.pt" else save_pruned(*pruned, path))
    assert torch.equal(load_pruned(build(), path)(X), pruned[0](X))
    rewritten(path, lambda weights: weights["3.bias"].add_(1))
    with pytest.raises(
        RecordError, match=r"weights differ from those that were written: '3.bias'; pass verify=False"
    ):
        load_pruned(build(), path)
    insisted = load_pruned(build(), path, verify=False)
    assert torch.equal(insisted[3].bias, pruned[0][3].bias + 1)


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_weights_are_not_converted_silently(
    pruned: tuple[nn.Sequential, PruningRecord], tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    (save_net(path, *pruned) if name == "net.pt" else save_pruned(*pruned, path))
    half = build().half()
    with pytest.raises(RecordError, match=r"is torch.float32 in the file, but torch.float16 in the model"):
        load_pruned(half, path)
    assert half[0].out_channels == 8
    assert load_pruned(half, path, verify=False)[0].weight.dtype == torch.float16


def test_files_from_before_there_were_checksums_load(
    pruned: tuple[nn.Sequential, PruningRecord], tmp_path: Path
) -> None:
    net, record = pruned
    plain = {name: record.to_dict()[name] for name in ("version", "kept", "shapes", "attributes", "info")}
    torch.save({"state_dict": net.state_dict(), "record": plain}, tmp_path / "net.pt")
    entry = {"record": plain, "submodule": None}
    torch.save({"state_dict": net.state_dict(), "lightning_prune": entry}, tmp_path / "it.ckpt")
    save_file(dict(net.state_dict()), tmp_path / "it.safetensors", {"lightning_prune": json.dumps(entry)})
    for name in ("net.pt", "it.ckpt", "it.safetensors"):
        assert torch.equal(load_pruned(build(), tmp_path / name)(X), net(X))


def test_a_summary_that_was_changed_is_refused(tmp_path: Path) -> None:
    Summary("completed", seed=1, test={"miou": 0.5, "loss": float("nan")}).save(tmp_path)
    path = tmp_path / "summary.json"
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(ValueError, match=r"summary.json is damaged.*checksum.*verify=False"):
        Summary.load(tmp_path)
    assert Summary.load(tmp_path, verify=False).test["miou"] == 0.9


def test_an_attribute_does_not_grow_by_a_record_without_checksum() -> None:
    class Heads(nn.Linear):
        num_heads = 1

        def __init__(self) -> None:
            super().__init__(4, 3)
            self.num_heads = 1

    record = PruningRecord({"weight": {0: [0]}}, {"weight": [3, 4]}, {"num_heads": 2})
    with pytest.raises(RecordError, match="'num_heads' to 2, more than its value in Heads, 1"):
        record.apply_(Heads())


@pytest.mark.parametrize("number", [10**400, 2**63, float("nan"), float("inf")])
def test_numbers_of_a_record_are_finite_and_in_range(tmp_path: Path, number: Any) -> None:
    plain = {
        "version": 1,
        "kept": {"w": {"0": [0, 1]}},
        "shapes": {"w": [3]},
        "attributes": {"a": 1},
        "info": {},
    }
    for changed in (
        {"kept": {"w": {"0": [0, number]}}},
        {"shapes": {"w": [number]}},
        {"attributes": {"a": number}},
    ):
        (tmp_path / "record.json").write_text(json.dumps({**plain, **changed}))
        with pytest.raises(RecordError):
            PruningRecord.load(tmp_path / "record.json")
    info = tmp_path / "info.json"
    PruningRecord(info={"loss": number, 3: (1, 2)}).save(info)
    assert PruningRecord.load(info).info["3"] == [1, 2]


def test_reading_a_file_runs_nothing_of_the_network(tmp_path: Path) -> None:
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).train()
    before = net.parametrizations.weight[0]._u.clone()
    fingerprint(net)
    assert torch.equal(net.parametrizations.weight[0]._u, before)


def test_a_file_of_torch_is_read_as_it_was_written(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, "text"], "b": torch.arange(3), "c": (True, b"bytes")}
    torch.save(content, tmp_path / "new.pt")
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("new.pt", "old.pt"):
        assert str(load_torch_file(tmp_path / name)) == str(content)


def test_a_run_in_low_precision_is_loaded_into_a_network_of_its_own_dtype(tmp_path: Path) -> None:
    net = build().bfloat16()
    save_net(tmp_path / "net.pt", net, PruningRecord(dense=fingerprint(net)))
    loaded = load_net(build(), tmp_path / "net.pt")
    assert loaded[0].weight.dtype == torch.float32
    assert torch.equal(loaded[0].weight, net[0].weight.float())
