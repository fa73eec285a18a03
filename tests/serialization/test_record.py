"""Tests of pruning records: saving, applying to dense models, composing, and refusing damaged ones."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_prune import PruningRecord, RecordError, prune_, trace
from lightning_prune.testing import randomise_
from tests.support.nets import Attention, Small, assert_same, parameters, random_units, state

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def cut():
    torch.manual_seed(0)
    dense = randomise_(Small()).eval()
    model = copy.deepcopy(dense)
    graph = trace(model, X)
    return dense, model, prune_(model, graph, random_units(graph))


def test_a_record_lists_what_survives_as_plain_numbers(cut):
    dense, model, record = cut
    before, after = dict(dense.state_dict()), dict(model.state_dict())
    assert set(record.kept) == {name for name in before if before[name].shape != after[name].shape}
    for name, dims in record.kept.items():
        assert record.shapes[name] == list(before[name].shape)
        for dim, kept in dims.items():
            assert all(type(i) is int for i in kept)
            assert len(kept) == after[name].shape[dim] < before[name].shape[dim]
    assert record.attributes["stem.out_channels"] == len(record.kept["stem.weight"][0])
    assert record.attributes["depthwise.groups"] == model.depthwise.groups


def test_saving_and_loading_gives_the_same_record(cut, tmp_path):
    record = cut[2]
    record.info["macs"] = {"before": 10, "after": 4.5}
    path = tmp_path / "new" / "folders" / "record.json"
    record.save(path)
    loaded = PruningRecord.load(path)
    assert loaded == record
    assert bool(loaded)
    assert json.loads(path.read_text())["version"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_an_interrupted_save_does_not_change_the_file(cut, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    cut[2].save(path)
    before = path.read_text()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        PruningRecord({"w": {0: [1]}}, {"w": [2]}).save(path)
    assert path.read_text() == before


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.support.nets import Small
from lightning_prune import PruningRecord
torch.set_num_threads(1)
folder = sys.argv[2]
model = PruningRecord.load(folder + "/record.json").apply_(Small()).eval()
model.load_state_dict(torch.load(folder + "/weights.pt", weights_only=True))
torch.save(model(torch.load(folder + "/x.pt", weights_only=True)).detach(), folder + "/out.pt")
"""


def test_a_fresh_model_in_another_process_becomes_the_pruned_one(cut, tmp_path):
    _, model, record = cut
    record.save(tmp_path / "record.json")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save(X, tmp_path / "x.pt")
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", SCRIPT, here, str(tmp_path)], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), model(X))


def test_a_record_applied_to_the_dense_weights_gives_the_pruned_model(cut):
    dense, model, record = cut
    again = record.apply_(copy.deepcopy(dense))
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert repr(again) == repr(model)
    assert torch.equal(again(X), model(X))


def test_applying_keeps_parameter_objects_and_drops_gradients(cut):
    dense, _, record = cut
    fresh = copy.deepcopy(dense)
    fresh(X).sum().backward()
    before = {name: id(p) for name, p in fresh.named_parameters()}
    record.apply_(fresh)
    assert {name: id(p) for name, p in fresh.named_parameters()} == before
    assert all(p.grad is None for name, p in fresh.named_parameters() if name in record.kept)
    assert any(p.grad is not None for p in fresh.parameters())


def test_sizes_in_attributes_are_set_too():
    dense = nn.Sequential(nn.Linear(7, 12), Attention(), nn.Linear(12, 2))
    model = copy.deepcopy(dense)
    x = torch.randn(2, 5, 7)
    graph = trace(model, x)
    record = prune_(model, graph, [*graph.layers["1.qkv.weight"][:1], *graph.layers["0.weight"][:5]])
    again = record.apply_(copy.deepcopy(dense))
    assert record.attributes["1.num_heads"] == again[1].num_heads == 3
    assert torch.equal(again(x), model(x))


def test_a_record_applies_to_a_model_on_the_meta_device(cut):
    _, model, record = cut
    with torch.device("meta"):
        skeleton = Small()
    record.apply_(skeleton)
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(skeleton.eval()(X), model(X))


# -- several cuts ---------------------------------------------------------------------------------------


def test_two_rounds_composed_are_the_model_after_both(cut):
    dense, model, first = cut
    model = copy.deepcopy(model)
    graph = trace(model, X)
    second = prune_(model, graph, random_units(graph, 1))
    third_graph = trace(model, X)
    third = prune_(model, third_graph, random_units(third_graph, 2, 0.4))
    for record in (first.then(second).then(third), first.then(second.then(third))):
        again = record.apply_(copy.deepcopy(dense))
        assert_same(dict(again.state_dict()), dict(model.state_dict()))
        assert again.depthwise.groups == model.depthwise.groups
        assert torch.equal(again(X), model(X))


def subset(draw: Any, size: int) -> list[int]:
    chosen = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return sorted(chosen)


@st.composite
def chains(draw: Any) -> tuple[torch.Tensor, list[PruningRecord]]:
    """A weight and up to four cuts, each relative to what the one before left."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    tensor, records = torch.arange(torch.Size(shape).numel()).reshape(shape).float(), []
    now = list(shape)
    for _ in range(draw(st.integers(1, 4))):
        dims = {dim: subset(draw, now[dim]) for dim in draw(st.sets(st.integers(0, len(shape) - 1)))}
        shapes = {"weight": list(now)} if dims else {}
        records.append(PruningRecord({"weight": dims} if dims else {}, shapes, {"size": sum(now)}))
        now = [len(dims[d]) if d in dims else n for d, n in enumerate(now)]
    return tensor, records


class Holder(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.size = 0


@given(chains())
@settings(max_examples=150, deadline=None)
def test_any_chain_of_records_composes_to_one_record_of_the_dense_model(chain):
    tensor, records = chain
    step_by_step, at_once, right_first = Holder(tensor), Holder(tensor), Holder(tensor)
    whole = PruningRecord()
    for record in records:
        record.apply_(step_by_step)
        whole = whole.then(record)
    from_the_right = records[-1]
    for record in records[-2::-1]:
        from_the_right = record.then(from_the_right)
    whole.apply_(at_once)
    from_the_right.apply_(right_first)
    assert torch.equal(at_once.weight, step_by_step.weight)
    assert torch.equal(right_first.weight, step_by_step.weight)
    assert at_once.size == step_by_step.size
    assert PruningRecord.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


def test_composing_does_not_change_either_record(cut):
    first = cut[2]
    second = PruningRecord({"inner.weight": {0: [0]}}, {"inner.weight": [3, 4, 3, 3]}, {"x": 1})
    before = copy.deepcopy((first, second))
    first.then(second).kept["stem.weight"][0].clear()
    assert (first, second) == before


# -- damage ----------------------------------------------------------------------------------------------------


def damaged(change: Any) -> Any:
    def apply(record: PruningRecord) -> PruningRecord:
        plain = copy.deepcopy(record.to_dict())
        change(plain)
        return PruningRecord.from_dict(plain)

    return apply


def _set(*path: str, value: Any) -> Any:
    def change(plain: dict[str, Any]) -> None:
        *way, last = path
        for key in way:
            plain = plain[key]
        plain[last] = value

    return change


def _drop(*path: str) -> Any:
    def change(plain: dict[str, Any]) -> None:
        *way, last = path
        for key in way:
            plain = plain[key]
        del plain[last]

    return change


WEIGHT = ("kept", "mix.weight", "0")  # late in the order of parameters: much would be cut before it
DAMAGES = {
    "an_index_out_of_range": _set(*WEIGHT, value=[0, 10]),
    "a_negative_index": _set(*WEIGHT, value=[-1, 2]),
    "an_index_twice": _set(*WEIGHT, value=[1, 1]),
    "not_ascending": _set(*WEIGHT, value=[2, 1]),
    "no_index_left": _set(*WEIGHT, value=[]),
    "a_fraction": _set(*WEIGHT, value=[0, 1.5]),
    "a_truth_value": _set(*WEIGHT, value=[False, True]),
    "a_string_of_digits": _set(*WEIGHT, value="12"),
    "a_number_for_a_list": _set(*WEIGHT, value=3),
    "nothing_for_a_list": _set(*WEIGHT, value=None),
    "a_dimension_that_does_not_exist": _set("kept", "mix.weight", "4", value=[0]),
    "a_negative_dimension": _set("kept", "mix.weight", "-1", value=[0]),
    "a_dimension_that_is_no_number": _set("kept", "mix.weight", "rows", value=[0]),
    "a_parameter_that_does_not_exist": _set("kept", "nowhere.weight", value={"0": [0]}),
    "a_shape_of_another_model": _set("shapes", "mix.weight", value=[10, 17, 1, 1]),
    "no_shape": _drop("shapes", "mix.weight"),
    "an_attribute_of_no_module": _set("attributes", "nowhere.groups", value=2),
    "an_attribute_that_does_not_exist": _set("attributes", "mix.colour", value=2),
    "an_attribute_that_is_no_number": _set("attributes", "mix.groups", value="2"),
    "an_attribute_that_is_a_method": _set("attributes", "mix.forward", value=2),
    "an_attribute_that_is_a_parameter": _set("attributes", "mix.weight", value=2),
    "an_attribute_that_is_a_module": _set("attributes", "mix", value=2),
    "a_list_for_a_number": _set("attributes", "mix.groups", value=[2, 2]),
    "a_number_for_a_list_of_sizes": _set("attributes", "mix.stride", value=2),
    "a_number_of_no_size": _set("attributes", "depthwise.groups", value=0),
    "no_kept": _drop("kept"),
    "no_shapes": _drop("shapes"),
    "no_attributes": _drop("attributes"),
    "kept_is_a_list": _set("kept", value=[1, 2]),
    "another_version": _set("version", value=2),
    "no_version": _drop("version"),
    "info_is_a_number": _set("info", value=3),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_record_is_refused_before_anything_changes(cut, name):
    dense, _, record = cut
    fresh = copy.deepcopy(dense)
    before = state(fresh)
    with pytest.raises(RecordError):
        damaged(DAMAGES[name])(record).apply_(fresh)
    assert_same(state(fresh), before)
    assert fresh.mix.forward.__func__ is nn.Conv2d.forward


CONTENTS = {
    "empty": b"",
    "not_json": b"{kept:",
    "half_of_a_record": b'{"version": 1, "kept": {"a": {"0": [1, 2',
    "not_text": b"\x80\x02\xff\xfe",
    "a_list": b"[1, 2, 3]",
    "null": b"null",
    "a_string": b'"record"',
    "nested_too_deep": b"[" * 100_000 + b"]" * 100_000,
    "nested_objects_too_deep": b'{"version": 1, "kept": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    "a_number_too_long": b'{"version": ' + b"9" * 10_000 + b"}",
    "not_a_number": b'{"version": 1, "kept": {"a": {"0": [NaN]}}, "shapes": {}, "attributes": {}}',
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_no_record_is_refused(tmp_path, name):
    path = tmp_path / "record.json"
    path.write_bytes(CONTENTS[name])
    with pytest.raises(RecordError):
        PruningRecord.load(path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        PruningRecord.load(tmp_path / "nowhere.json")


def test_a_record_is_not_applied_twice(cut):
    _, model, record = cut
    again = copy.deepcopy(model)
    before = state(again)
    with pytest.raises(RecordError, match=r"has shape .* the record was made for"):
        record.apply_(again)
    assert_same(state(again), before)


def test_a_record_of_another_architecture_names_what_is_missing(cut):
    other = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(RecordError, match=r"stem.weight.*Sequential does not have"):
        cut[2].apply_(other)
    assert parameters(other) == 3 * 8 * 9 + 8


def test_an_empty_record_is_false_and_does_nothing(cut):
    dense = copy.deepcopy(cut[0])
    before = state(dense)
    assert not PruningRecord()
    assert PruningRecord().apply_(dense) is dense
    assert_same(state(dense), before)
