"""Tests that the record of all cuts travels with a network, and leads back to the dense shapes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_prune import PruningRecord, RecordError, load_pruned, one_shot, prune_, save_pruned, trace
from lightning_prune.serialization.carried_record import carried_record, dense_again_, regrow_
from lightning_prune.serialization.cut_notes import NOTE
from lightning_prune.surgery.rollback import snapshot
from tests.support.nets import Net


class Block(nn.Module):
    """Attention, groups, a norm across channels, and weights that are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(1, 16)
        self.wide = nn.Conv2d(16, 32, 1)
        self.depth = nn.Conv2d(32, 32, 3, groups=32, padding=1)
        self.back = nn.Conv2d(32, 16, 1)
        self.tied = nn.Conv2d(16, 32, 1, bias=False)
        self.tied.weight = self.wide.weight
        self.slope = nn.PReLU(32)
        self.head = nn.Linear(16, 4)
        self.register_buffer("scale", torch.rand(1, 32, 1, 1), persistent=False)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.slope(self.depth(self.wide(x) * self.scale)) + self.tied(x)
        return self.head((x + self.back(y)).mean((2, 3)))


def cut(net: nn.Module, share: int = 3) -> PruningRecord:
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    remove = [
        unit for units in graph.layers.values() for unit in units[::share] if unit in set(graph.prunable)
    ]
    return prune_(net, graph, set(remove))


def assert_same_values(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(tensors(one).items(), tensors(other).values(), strict=True):
        assert torch.equal(a, b), name


def tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*net.named_parameters(), *net.named_buffers()])


def test_the_record_is_that_of_all_cuts_relative_to_the_dense_network():
    net, dense = Block(), Block()
    dense.load_state_dict(net.state_dict())
    dense.scale.copy_(net.scale)
    first = cut(net)
    record = first.then(cut(net))
    assert carried_record(net) == record
    assert len(record.kept["wide.weight"][0]) < len(first.kept["wide.weight"][0]) < 32
    assert_same_values(carried_record(net).apply_(dense), net)
    assert carried_record(dense) == record


def test_a_dense_network_carries_nothing():
    assert not carried_record(Block())
    net = Block()
    regrow_(net)
    assert NOTE not in vars(net.wide)


@pytest.mark.parametrize("travel", ["deepcopy", "pickle", "torch.save", "part of another"])
def test_the_record_travels_with_the_network(travel):
    net = Block()
    record = cut(net)
    if travel == "deepcopy":
        net = copy.deepcopy(net)
    elif travel == "pickle":
        net = pickle.loads(pickle.dumps(net))
    elif travel == "torch.save":
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        net = torch.load(file, weights_only=False)
    else:
        net = nn.ModuleDict({"a": nn.Sequential(net), "b": Block()})
        record = PruningRecord(
            {f"a.0.{name}": dims for name, dims in record.kept.items()},
            {f"a.0.{name}": shape for name, shape in record.shapes.items()},
            {f"a.0.{path}": value for path, value in record.attributes.items()},
        )
    assert carried_record(net) == record


def test_a_part_carries_its_own_part_of_the_record():
    net = Block()
    record = cut(net)
    assert carried_record(net.depth).kept == {
        "weight": record.kept["depth.weight"],
        "bias": record.kept["depth.bias"],
    }
    assert carried_record(net.depth).attributes["groups"] == net.depth.groups
    assert carried_record(net.tied).kept["weight"] == record.kept["wide.weight"]  # shared, under another name


def test_regrown_network_has_the_dense_shapes_and_what_is_left_of_the_values():
    net, dense = Block(), Block()
    dense.load_state_dict(net.state_dict())
    dense.scale.copy_(net.scale)
    text, shapes = str(dense), {name: tensor.shape for name, tensor in tensors(net).items()}
    objects = {name: id(tensor) for name, tensor in tensors(net).items()}
    cut(net)
    record = carried_record(net) if cut(net) else None
    small = copy.deepcopy(net)
    regrow_(net)
    assert str(net) == text
    assert {name: tensor.shape for name, tensor in tensors(net).items()} == shapes
    assert {name: id(tensor) for name, tensor in tensors(net).items()} == objects
    assert net.tied.weight is net.wide.weight
    assert torch.equal(net.scale, dense.scale)  # in no file, and therefore kept
    removed = sorted(set(range(32)) - set(record.kept["wide.weight"][0][0:99]))
    assert net.wide.weight[removed].abs().sum() == 0
    assert not carried_record(net)
    assert_same_values(record.apply_(net), small)
    regrow_(net)
    net.load_state_dict(dense.state_dict())
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(net(x), dense(x))


def test_parts_that_vanished_come_back_trainable():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Conv2d(8, 8, 1)
            self.stem = nn.Conv2d(3, 8, 1)

        def forward(self, x):
            return self.branch(self.stem(x))

    record = PruningRecord({"weight": {0: []}, "bias": {0: []}}, {"weight": [8, 8, 1, 1], "bias": [8]})
    net = Optional()
    net.optional_parts = [net.branch]
    PruningRecord(
        {f"branch.{name}": dims for name, dims in record.kept.items()},
        {f"branch.{name}": shape for name, shape in record.shapes.items()},
    ).apply_(net)
    assert not net.branch.weight.requires_grad
    regrow_(net)
    assert net.branch.weight.requires_grad
    assert net.branch.weight.shape == (8, 8, 1, 1)


def test_networks_are_cut_again_if_the_block_fails():
    net = Block()
    cut(net)
    before, record = copy.deepcopy(net), carried_record(net)
    seen = []
    with pytest.raises(ZeroDivisionError), dense_again_([(net, ())]):
        seen.append(1 // (32 - net.wide.out_channels))
    assert_same_values(net, before)
    assert carried_record(net) == record
    assert str(net) == str(before)


def test_rolled_back_cut_leaves_no_note():
    net = Block()
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    restore = snapshot(net, graph.bindings)
    cut(net)
    restore()
    assert not carried_record(net)
    cut(net)
    record = carried_record(net)
    restore = snapshot(net, graph.bindings)
    cut(net)
    restore()
    assert carried_record(net) == record


def test_tensors_that_were_replaced_are_named():
    net = Block()
    cut(net)
    net.wide.weight = nn.Parameter(torch.zeros(32, 16, 1, 1))
    with pytest.raises(RecordError, match=r"'wide.weight' has shape .* it was replaced since"):
        carried_record(net)


def test_load_pruned_takes_a_network_of_any_size(tmp_path):
    net = Block()
    save_pruned(net, None, tmp_path / "dense.safetensors")
    cut(net)
    save_pruned(net, carried_record(net), tmp_path / "first.safetensors")
    cut(net)
    save_pruned(net, carried_record(net), tmp_path / "second.safetensors")
    for name in ("dense", "second", "first", "dense", "first", "second", "second"):
        load_pruned(net, tmp_path / f"{name}.safetensors")
        fresh = load_pruned(Block(), tmp_path / f"{name}.safetensors")
        assert str(net) == str(fresh)
        assert carried_record(net) == carried_record(fresh)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))


def test_load_pruned_still_takes_a_record_relative_to_the_network_that_was_given(tmp_path):
    net = Block()
    first = cut(net)
    again = copy.deepcopy(net)
    second = cut(again)
    save_pruned(again, second, tmp_path / "relative.safetensors")
    loaded = load_pruned(net, tmp_path / "relative.safetensors")
    assert carried_record(loaded) == first.then(second)


def test_one_shot_twice_is_one_record():
    net, example = Block(), torch.zeros(1, 3, 8, 8)
    first, second = (one_shot(net, example, {"params": 0.8}) for _ in range(2))
    assert carried_record(net) == first.then(second)


def test_a_note_is_a_string_that_tracing_passes_over():
    net = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    record = cut(net)
    assert type(vars(net.a)[NOTE]) is str
    assert carried_record(net) == record
