"""Tests of prune_: failed cuts are rolled back, references stay valid, values are kept."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import SurgeryError, prune_, trace
from lightning_prune.surgery.proof import ProofError, concerned_units
from lightning_prune.testing import error, randomise_, with_dead_filters
from lightning_prune.tracing.rules.registry import RULES
from tests.support.nets import Attention, Net, Small, assert_same, random_units, state
from tests.support.surgery_steps import X, step


@pytest.fixture
def model() -> nn.Module:
    return randomise_(Small())


@pytest.fixture
def graph(model):
    return trace(model, X)


# -- rollback -------------------------------------------------------------------------------------------


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": state(model),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "identities": {id(p): {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()},
        "python": random.getstate(),
    }


def raising_when_smaller(model: nn.Module) -> None:
    """Let the model raise if its stem has fewer than eight filters."""

    def check(module: nn.Module, args: Any) -> None:
        if module.stem.weight.shape[0] < 8:
            raise RuntimeError("my stem wants eight filters")

    model.register_forward_pre_hook(check)


def wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the rule for concatenation by one with the ids in reverse order."""
    right = RULES[torch.ops.aten.cat.default]

    def wrong(call: Any, tracker: Any) -> None:
        right(call, tracker)
        tracker.label(call.out, [tuple(ids.flip(0) for ids in arrays) for arrays in tracker.labels(call.out)])

    monkeypatch.setitem(RULES, torch.ops.aten.cat.default, wrong)


@pytest.mark.parametrize("cause", ["raises", "wrong_rule", "interrupted"])
def test_a_cut_that_fails_its_proof_is_rolled_back_completely(model, monkeypatch, cause):
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    step(model, optimizer)
    if cause == "raises":
        raising_when_smaller(model)
    graph = trace(model, X)
    expected: type[BaseException] = SurgeryError
    if cause == "wrong_rule":
        wrong_rule(monkeypatch)
    elif cause == "interrupted":
        expected = KeyboardInterrupt

        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("lightning_prune.surgery.prune.prove", interrupt)
    before = everything(model, optimizer)
    shapes = [tuple(p.shape) for p in model.parameters()]
    with pytest.raises(expected) as caught:
        prune_(model, graph, random_units(graph), [optimizer])
    if cause == "raises":
        assert "my stem wants eight filters" in str(caught.value)
    if cause == "wrong_rule":
        assert "aten::convolution in mix" in str(caught.value)  # which reads what was concatenated
        assert len(caught.value.units)
        assert set(caught.value.units.tolist()) <= set(graph.prunable.tolist())
    if cause != "interrupted":
        assert "rolled back" in str(caught.value)
    assert_same(everything(model, optimizer), before)
    assert [tuple(p.shape) for p in model.parameters()] == shapes
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert step(model, optimizer) >= 0


def test_rollback_restores_the_attributes_that_a_cut_has_set(monkeypatch):
    net = Net(
        lambda m, x: m.head(m.attention(m.embed(x))),
        embed=nn.Linear(7, 12), attention=Attention(), head=nn.Linear(12, 2), split=(3, 5),
    )  # fmt: skip
    graph = trace(net, torch.randn(2, 5, 7))
    heads = np.unique(graph.layers["attention.qkv.weight"])
    before = state(net)

    def failing(*args: Any) -> None:
        assert net.attention.num_heads == 3  # the cut had been made
        assert net.attention.qkv.out_features == 27
        raise RuntimeError("no proof today")

    monkeypatch.setattr("lightning_prune.surgery.prune.prove", failing)
    with pytest.raises(RuntimeError, match="no proof today"):
        prune_(net, graph, heads[:1])
    assert_same(state(net), before)
    monkeypatch.undo()
    prune_(net, graph, heads[:1])
    assert net.attention.num_heads == 3
    assert net.attention.head_dim == 3


def test_after_a_rollback_the_same_graph_can_still_be_cut_elsewhere(model, monkeypatch):
    dense = copy.deepcopy(model)
    graph = trace(model, X)
    with monkeypatch.context() as patched:
        wrong_rule(patched)
        with pytest.raises(SurgeryError):
            prune_(model, graph, random_units(graph))
    remove = graph.layers["inner.weight"][:3]
    prune_(model, graph, remove)
    assert error(with_dead_filters(dense, graph, remove), model, X) < 1e-5
    assert model.inner.out_channels == 3


# -- refusals before anything is changed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda g: [int(g.layers["head.weight"][0])], "unit .* must stay: is the network's output"),
        (lambda g: g.layers["inner.weight"], "nothing would be left of 'inner"),
        (lambda g: [10_000], "no such unit"),
        (lambda g: [-1], "unit -1"),
    ],
    ids=["pinned", "all_of_a_layer", "no_such_unit", "negative"],
)
def test_forbidden_cuts_are_refused_and_nothing_changes(model, graph, choose, message):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    before = everything(model, optimizer)
    with pytest.raises(SurgeryError, match=message):
        prune_(model, graph, choose(graph), [optimizer])
    assert_same(everything(model, optimizer), before)


def test_a_graph_from_before_another_cut_is_refused(model, graph):
    prune_(model, graph, graph.layers["inner.weight"][:2])
    before = state(model)
    with pytest.raises(
        SurgeryError, match=r"inner.*has changed its shape since the trace; trace the model again"
    ):
        prune_(model, graph, graph.layers["mix.weight"][:2])
    assert_same(state(model), before)


def test_a_graph_of_another_model_is_refused(model, graph):
    other = Small()
    before = state(other)
    with pytest.raises(SurgeryError, match="traced from another model"):
        prune_(other, graph, graph.layers["inner.weight"][:2])
    assert_same(state(other), before)


def test_removing_nothing_changes_nothing(model, graph):
    before = state(model)
    record = prune_(model, graph, [])
    assert not record
    assert_same(state(model), before)


def test_a_unit_named_twice_is_removed_once(model, graph):
    unit = int(graph.layers["inner.weight"][1])
    record = prune_(model, graph, [unit, unit])
    assert record.kept["inner.weight"][0] == [0, 2, 3, 4, 5]


# -- references stay valid -------------------------------------------------------------------------------------


def test_parameter_objects_stay_and_their_gradients_are_none(model, graph):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    buffers = {name: id(b) for name, b in model.named_buffers()}
    record = prune_(model, graph, random_units(graph))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert {name: id(b) for name, b in model.named_buffers()} == buffers
    parameters = dict(model.named_parameters())
    cut = [name for name in record.kept if name in parameters]
    assert len(cut) > 10
    assert all(parameters[name].grad is None for name in cut)
    assert all(p.is_leaf and p.is_contiguous() for p in parameters.values())


def test_surviving_values_do_not_change(model, graph):
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record = prune_(model, graph, random_units(graph))
    for name, tensor in model.state_dict().items():
        expected = dense[name]
        for dim, indices in record.kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.tensor(indices))
        assert torch.equal(tensor, expected), name
    assert record.kept["stem.weight"].keys() == {0}
    assert record.kept["mix.weight"].keys() == {0, 1}


def test_size_attributes_match_the_tensors(model, graph):
    prune_(model, graph, random_units(graph))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels // module.groups) == module.weight.shape[:2]
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_mean)
    assert model.depthwise.groups == model.depthwise.in_channels == len(model.stem.weight)
    assert all(type(value) is int for m in model.modules() for value in vars(m).values() if isinstance(value, int)
               and not isinstance(value, bool))  # fmt: skip


def test_shared_weights_stay_shared():
    shared = nn.Conv2d(8, 8, 1)
    net = Net(
        lambda m, x: m.head(m.second(F.relu(m.first(m.stem(x))))),
        stem=nn.Conv2d(3, 8, 1), first=shared, second=nn.Conv2d(8, 8, 1), head=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    net.second.weight = shared.weight
    net = randomise_(net)
    dense = copy.deepcopy(net)
    graph = trace(net, X)
    remove = random_units(graph)
    prune_(net, graph, remove)
    assert net.second.weight is net.first.weight
    assert net.first.weight.shape[0] < 8
    assert error(with_dead_filters(dense, graph, remove), net, X) < 1e-5


def test_channels_last_weights_stay_channels_last(model):
    model = model.to(memory_format=torch.channels_last)
    graph = trace(model, X)
    prune_(model, graph, random_units(graph))
    assert model.back.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.back.weight.is_contiguous()
    assert model.hidden.weight.is_contiguous()


def test_half_precision_and_integer_buffers_keep_their_types(model):
    model = model.bfloat16()
    model.register_buffer("count", torch.arange(8, dtype=torch.int16))
    graph = trace(model, X.bfloat16())
    prune_(model, graph, random_units(graph))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.norm.num_batches_tracked.dtype == torch.int64
    assert model.count.tolist() == list(range(8))


def test_a_cut_does_not_change_training_flags_hooks_or_random_state(model, graph):
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    model.train()
    model.norm.eval()
    graph = trace(model, X)
    before = state(model)
    prune_(model, graph, random_units(graph))
    after = state(model)
    for what in ("modes", "hooks", "random", "objects", "needs"):
        assert_same(after[what], before[what])
    calls.clear()
    model(X)
    assert calls == [1]


# -- several cuts -------------------------------------------------------------------------------------------


def test_several_rounds_of_trace_and_cut_stay_exact(model):
    model = model.double().eval()
    dense, twin, macs = copy.deepcopy(model), copy.deepcopy(model), []
    for seed in range(4):
        graph = trace(model, X.double())
        remove = random_units(graph, seed, 0.25)
        twin = with_dead_filters(copy.deepcopy(model), graph, remove)
        prune_(model, graph, remove)
        assert error(twin, model, X.double()) < 1e-12
        macs.append(graph.cost("macs", remove))
    assert sorted(macs, reverse=True) == macs
    assert macs[-1] < 0.3 * trace(dense, X.double()).cost("macs")


def test_down_to_one_filter_in_every_layer(model):
    dense = copy.deepcopy(model)
    graph = trace(model, X)
    remove = random_units(graph, 0, 1.0)
    prune_(model, graph, remove)
    assert {model.stem.out_channels, model.inner.out_channels, model.mix.out_channels} == {1}
    assert model.hidden.out_features == 1
    assert error(with_dead_filters(dense, graph, remove), model, X) < 1e-5
    again = trace(model, X)
    assert random_units(again, 0, 1.0).size == 0


@pytest.mark.parametrize("seed", range(4))
def test_one_unit_at_a_time_is_the_same_as_all_at_once(seed):
    torch.manual_seed(seed)
    at_once = randomise_(Small()).eval()
    one_by_one = copy.deepcopy(at_once)
    graph = trace(at_once, X)
    remove = random_units(graph, seed, 0.3)
    names = {unit: (name, i) for name, units in graph.layers.items() for i, unit in enumerate(units)}
    kept = {name: list(range(len(units))) for name, units in graph.layers.items()}
    prune_(at_once, graph, remove)
    for unit in remove.tolist():
        name, position = names[unit]
        now = trace(one_by_one, X)
        record = prune_(one_by_one, now, [int(now.layers[name][kept[name].index(position)])])
        for layer in kept:
            dims = record.kept.get(layer, {})
            if now.filter_dims[layer] in dims:
                kept[layer] = [kept[layer][i] for i in dims[now.filter_dims[layer]]]
    assert_same(dict(one_by_one.state_dict()), dict(at_once.state_dict()))


def test_an_error_that_names_kept_units_concerns_the_nearest_removed_ones():
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1)), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    graph = trace(net, torch.zeros(1, 3, 5, 5))
    first, last = graph.layers["0.0.weight"], graph.layers["2.weight"]
    refusal = ProofError("made up", last[:1], "0.2")
    assert concerned_units(graph, refusal, last[:2]).tolist() == last[:1].tolist()  # as it says
    both = np.r_[first[:2], last[1:]]
    assert concerned_units(graph, refusal, both).tolist() == first[:2].tolist()  # read there
    refusal.module = "2"
    assert concerned_units(graph, refusal, first[:2]).tolist() == first[:2].tolist()  # nothing nearer
    refusal.module = ""
    assert concerned_units(graph, refusal, first[:2]).tolist() == first[:2].tolist()
