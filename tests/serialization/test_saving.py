"""Tests of saving and loading pruned networks, without a trainer; damaged files change nothing."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune import (
    PruningRecord,
    RecordError,
    last_checkpoint,
    load_pruned,
    prune_,
    save_pruned,
    trace,
)
from lightning_prune.callbacks.pruning import FilterPruningCallback
from lightning_prune.reporting.run_folder import save_net
from lightning_prune.testing import randomise_
from tests.serialization.test_record import CONTENTS, DAMAGES
from tests.support.nets import Small, assert_same, random_units, state

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|not met)")
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(3))


class Module(L.LightningModule):
    """LightningModule around a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.ones(1))  # a name that the network has, too
        self.net = Small()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self(batch).square().mean() * self.mix.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(module: Module, submodule: str | None = None, resume: Path | None = None) -> L.Trainer:
    callback = FilterPruningCallback({"macs": 0.6}, amount={"macs": 1}, start_epoch=0, submodule=submodule)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(X, 2), ckpt_path=resume)
    return trainer


@pytest.fixture(scope="module", params=[None, "net"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Module, Path]:
    """A pruned module, and the folder of its files: whole checkpoint, weights only, and safetensors."""
    folder, module = tmp_path_factory.mktemp("trained"), Module()
    trainer = fit(module, request.param)
    trainer.save_checkpoint(folder / "whole.ckpt")
    trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    save_pruned(module, trainer.callbacks[0].record, folder / "new" / "it.safetensors", request.param)
    return module.eval(), folder


FILES = ["whole.ckpt", "weights.ckpt", "new/it.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_module_is_loaded_from_every_format(trained: tuple[Module, Path], name: str) -> None:
    module, folder = trained
    fresh = Module()
    assert load_pruned(fresh, folder / name) is fresh
    assert fresh.net.inner.out_channels < 6
    assert_same(dict(fresh.state_dict()), dict(module.state_dict()))
    assert torch.equal(fresh.eval()(X), module(X))


@pytest.mark.parametrize("name", FILES)
def test_the_bare_network_is_loaded_from_a_record_of_the_submodule(
    trained: tuple[Module, Path], name: str
) -> None:
    module, folder = trained
    fresh = Small()
    before = state(fresh)
    if json.loads(safe_open(folder / FILES[2], "pt").metadata()["lightning_prune"])["submodule"] == "net":
        assert torch.equal(load_pruned(fresh, folder / name).eval()(X), module(X))
    else:
        with pytest.raises(RecordError, match="which Small does not have"):
            load_pruned(fresh, folder / name)
        assert_same(state(fresh), before)


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.support.nets import Small
from lightning_prune import load_pruned
assert "lightning" not in sys.modules
torch.set_num_threads(1)
torch.save(load_pruned(Small(), sys.argv[2]).eval()(torch.load(sys.argv[3])).detach(), sys.argv[4])
"""


def test_another_process_needs_neither_trainer_nor_lightning(tmp_path: Path) -> None:
    model, record = small()
    save_pruned(model, record, tmp_path / "it.safetensors")
    torch.save(X, tmp_path / "x.pt")
    paths = [Path(__file__).parent, *(tmp_path / name for name in ("it.safetensors", "x.pt", "out.pt"))]
    subprocess.run([sys.executable, "-c", SCRIPT, *map(str, paths)], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "out.pt"), model(X))


def small() -> tuple[nn.Module, PruningRecord]:
    torch.manual_seed(0)
    model = randomise_(Small()).eval()
    graph = trace(model, X)
    return model, prune_(model, graph, random_units(graph))


def test_a_network_is_loaded_from_the_file_of_a_run(tmp_path: Path) -> None:
    model, record = small()
    save_net(tmp_path / "net.pt", model, record)
    assert torch.equal(load_pruned(Small(), tmp_path / "net.pt").eval()(X), model(X))


def test_a_network_that_was_never_cut_is_loaded_dense(tmp_path: Path) -> None:
    dense = Small()
    save_pruned(dense, None, tmp_path / "dense.safetensors")
    assert_same(
        dict(load_pruned(Small(), tmp_path / "dense.safetensors").state_dict()), dict(dense.state_dict())
    )


def test_shared_and_strided_weights_are_written_and_stay_shared(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Linear(4, 4), nn.Linear(4, 4))
        model[2].weight = model[1].weight
        return model.to(memory_format=torch.channels_last)

    model = tied()
    save_pruned(model, None, tmp_path / "tied.safetensors")
    fresh = load_pruned(tied(), tmp_path / "tied.safetensors")
    assert fresh[2].weight is fresh[1].weight
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))


def test_an_interrupted_save_does_not_change_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "it.safetensors"
    save_pruned(nn.Linear(2, 1), None, path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_pruned(nn.Linear(2, 2), None, path)
    assert path.read_bytes() == before


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_pruned(nn.Linear(2, 1), None, tmp_path / "it.pt")


# -- damage ----------------------------------------------------------------------------------------------------


def written(path: Path, model: nn.Module, pruned: Any) -> Path:
    """Write a file with ``pruned`` in the place of the record."""
    if path.suffix == ".safetensors":
        save_file(dict(model.state_dict()), path, {"lightning_prune": json.dumps(pruned)})
    else:
        torch.save({"state_dict": model.state_dict(), "lightning_prune": pruned}, path)
    return path


def refused(path: Path) -> str:
    fresh = Small()
    before = state(fresh)
    with pytest.raises(RecordError) as caught:
        load_pruned(fresh, path)
    assert_same(state(fresh), before)
    assert fresh.mix.forward.__func__ is nn.Conv2d.forward
    return str(caught.value)


#: Changes after which a record is valid, but does not fit the weights in the same file.
ODD = {
    "a_float_dimension": lambda plain: plain["kept"]["mix.weight"].update({0.5: [0]}),
    "a_padded_dimension": lambda plain: plain["kept"]["mix.weight"].update({"00": [0]}),
    "one_channel_more": lambda plain: plain["kept"]["mix.bias"].update({"0": [*range(9)]}),
    "a_cut_left_out": lambda plain: plain["kept"].pop("inner.weight"),
}


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("name", [*DAMAGES, *ODD])
def test_a_damaged_record_is_refused_before_anything_changes(name: str, ending: str, tmp_path: Path) -> None:
    model, record = small()
    plain = copy.deepcopy(record.to_dict())
    {**DAMAGES, **ODD}[name](plain)
    refused(written(tmp_path / f"it.{ending}", model, {"record": plain, "submodule": None}))


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize(
    "pruned",
    [[], "record", 3, {"record": [1]}, {"record": "x"}, {"record": {}, "submodule": 3}, {"submodule": "nat"}],
    ids=str,
)
def test_anything_but_a_record_is_refused(pruned: Any, ending: str, tmp_path: Path) -> None:
    refused(written(tmp_path / f"it.{ending}", small()[0], pruned))


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_of_another_kind_is_refused(name: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"it.{ending}"
    path.write_bytes(CONTENTS[name])
    assert str(path) in refused(path)


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_half_a_file_is_refused(ending: str, tmp_path: Path) -> None:
    model, record = small()
    path = written(tmp_path / f"it.{ending}", model, {"record": record.to_dict()})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path)


class Trap:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a checkpoint ran code')",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": small()[0].state_dict(), "extra": Trap()}, tmp_path / "it.ckpt")
    assert "weights_only=True" in refused(tmp_path / "it.ckpt")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    other = nn.Linear(3, 3)
    save_pruned(other, None, tmp_path / "it.safetensors")
    assert "differ in" in refused(tmp_path / "it.safetensors")


def test_a_model_that_was_cut_already_is_loaded_by_its_own_record(tmp_path: Path) -> None:
    model, record = small()
    save_pruned(model, record, tmp_path / "it.safetensors")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_pruned(model, tmp_path / "it.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    with path.open("wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(RecordError, match="has 200000000 bytes"):
        PruningRecord.load(path)


def test_a_missing_file_raises(tmp_path: Path) -> None:
    for name in ("it.ckpt", "it.safetensors"):
        with pytest.raises(FileNotFoundError):
            load_pruned(Small(), tmp_path / name)


@pytest.mark.parametrize(
    "name",
    ["an_attribute_of_no_module", "a_parameter_that_does_not_exist", "another_version", "a_cut_left_out"],
)
def test_resuming_refuses_a_damaged_record_before_anything_changes(name: str, tmp_path: Path) -> None:
    fit(Module(), "net").save_checkpoint(tmp_path / "it.ckpt")
    checkpoint = torch.load(tmp_path / "it.ckpt", weights_only=True)
    {**DAMAGES, **ODD}[name](checkpoint["lightning_prune"]["record"])
    torch.save(checkpoint, tmp_path / "it.ckpt")
    fresh = Module()
    before = state(fresh.net)
    with pytest.raises(RecordError):
        fit(fresh, "net", tmp_path / "it.ckpt")
    assert_same({**state(fresh.net), "random": None}, {**before, "random": None})


def test_resuming_refuses_a_submodule_that_is_not_there(tmp_path: Path) -> None:
    fit(Module(), "net").save_checkpoint(tmp_path / "it.ckpt")
    checkpoint = torch.load(tmp_path / "it.ckpt", weights_only=True)
    checkpoint["lightning_prune"]["submodule"] = "nat"
    torch.save(checkpoint, tmp_path / "it.ckpt")
    with pytest.raises(RecordError, match="the record describes the submodule 'nat'"):
        fit(Module(), "net", tmp_path / "it.ckpt")


# -- all or nothing --------------------------------------------------------------------------------------------


class Stateful(nn.Linear):
    """Keeps extra state in a list and a dictionary, and may refuse to load it."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.seen: list[Any] = [torch.zeros(1)]
        self.extra = {"a": torch.zeros(2)}

    def get_extra_state(self) -> Any:
        return {"refuse": False}

    def set_extra_state(self, state: Any) -> None:
        self.seen.append(state)
        self.extra["a"].add_(1)
        self.new = 1
        if state["refuse"]:
            raise KeyError("no such extra state")


LINEAR = PruningRecord(
    {"weight": {0: [0, 2]}, "bias": {0: [0, 2]}}, {"weight": [3, 4], "bias": [3]}, {"out_features": 2}
)
ODD_WEIGHTS: dict[str, Any] = {
    "sparse": lambda: torch.zeros(2, 4).to_sparse(),
    "sparse rows": lambda: torch.ones(2, 4).to_sparse_csr(),
    "on the meta device": lambda: torch.zeros(2, 4, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(4), torch.zeros(3)]),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(2, 4), 0.1, 0, torch.qint8),
    "complex": lambda: torch.zeros(2, 4, dtype=torch.complex64),
    "no tensor": lambda: [0.0] * 8,
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|CSR|quantize|deprecat)")
@pytest.mark.parametrize("name", ODD_WEIGHTS)
@pytest.mark.parametrize("verify", [True, False])
def test_weights_without_plain_values_are_refused_before_anything_changes(
    tmp_path: Path, name: str, verify: bool
) -> None:
    weights = {"weight": ODD_WEIGHTS[name](), "bias": torch.ones(2)}
    entry = {"record": LINEAR.to_dict(), "submodule": None}
    torch.save({"state_dict": weights, "lightning_prune": entry}, tmp_path / "it.ckpt")
    model = nn.Linear(4, 3)
    before = state(model)
    with pytest.raises(RecordError):
        load_pruned(model, tmp_path / "it.ckpt", verify)
    assert_same(state(model), before)


def test_an_error_in_the_extra_state_puts_everything_back(tmp_path: Path) -> None:
    weights = {"weight": torch.ones(2, 4), "bias": torch.ones(2), "_extra_state": {"refuse": True}}
    torch.save({"state_dict": weights, "record": LINEAR.to_dict()}, tmp_path / "it.ckpt")
    model = Stateful()
    model.weight.grad, lists = torch.ones(3, 4), (model.seen, model.extra)
    before = state(model)
    with pytest.raises(RecordError, match=r"it.ckpt: the file does not load into Stateful.*no such"):
        load_pruned(model, tmp_path / "it.ckpt")
    assert_same(state(model), before)
    assert (len(model.seen), model.extra["a"].tolist(), hasattr(model, "new")) == (1, [0, 0], False)
    assert (model.seen, model.extra) == lists
    assert model.seen is lists[0]
    weights["_extra_state"] = {"refuse": False}
    torch.save({"state_dict": weights, "record": LINEAR.to_dict()}, tmp_path / "it.ckpt")
    assert load_pruned(model, tmp_path / "it.ckpt").new == 1


def test_an_error_in_a_hook_puts_everything_back(tmp_path: Path) -> None:
    model, record = small()
    save_pruned(model, record, tmp_path / "it.safetensors")
    fresh = Small()
    fresh.register_load_state_dict_post_hook(lambda module, keys: [][0])
    before = state(fresh)
    with pytest.raises(RecordError, match="index out of range"):
        load_pruned(fresh, tmp_path / "it.safetensors")
    assert_same(state(fresh), before)


@pytest.mark.parametrize(
    "entries", [{3: torch.zeros(1), "z": torch.zeros(1)}, {None: 1}, {("a",): 1}], ids=str
)
def test_names_that_are_no_strings_are_refused(tmp_path: Path, entries: dict[Any, Any]) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(3, 4), **entries}}, tmp_path / "it.ckpt")
    with pytest.raises(RecordError, match="names that are not strings"):
        load_pruned(nn.Linear(4, 3), tmp_path / "it.ckpt")


def test_a_model_without_values_of_its_own_is_refused(tmp_path: Path) -> None:
    save_pruned(nn.Linear(4, 3), None, tmp_path / "it.safetensors")
    with torch.device("meta"):
        skeleton = nn.Linear(4, 3)
    with pytest.raises(RecordError, match="meta device"):
        load_pruned(skeleton, tmp_path / "it.safetensors")
    with pytest.raises(RecordError, match="lazy"):
        load_pruned(nn.LazyLinear(3), tmp_path / "it.safetensors")


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    for name in ("it.ckpt", "it.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(RecordError, match="a pipe"):
            load_pruned(nn.Linear(4, 3), tmp_path / name)
    os.mkfifo(tmp_path / "record.json")
    with pytest.raises(RecordError, match="a pipe"):
        PruningRecord.load(tmp_path / "record.json")


@pytest.mark.parametrize("name", FILES[:2])
def test_weights_that_were_changed_in_a_checkpoint_are_refused(
    trained: tuple[Module, Path], tmp_path: Path, name: str
) -> None:
    content = torch.load(trained[1] / name, weights_only=True)
    content["state_dict"]["net.mix.bias"] += 1
    torch.save(content, tmp_path / name)
    with pytest.raises(
        RecordError, match=r"differ from those that were written: 'net.mix.bias'; pass verify=False"
    ):
        load_pruned(Module(), tmp_path / name)
    changed = load_pruned(Module(), tmp_path / name, verify=False).net.mix.bias
    assert torch.equal(changed, trained[0].net.mix.bias + 1)
    if name == "whole.ckpt":
        with pytest.warns(UserWarning, match=r"whole.ckpt cannot be read and is skipped: .*net.mix.bias"):
            assert last_checkpoint(tmp_path) is None
