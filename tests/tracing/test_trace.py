"""The trace: costs, units, operators without a rule, networks with nothing to prune, errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import ChannelGraph, SurgeryError, TraceError, prune_, rule, trace
from lightning_prune.testing import error, randomise_, with_dead_filters
from lightning_prune.tracing.rules.registry import RULES, same_labels
from tests.support.nets import (
    Attention,
    Net,
    Small,
    assert_same,
    counted_macs,
    independent_units,
    parameters,
    random_units,
    state,
)

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
NETS = {
    "small": (Small, X),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 18, 3, groups=3), nn.ConvTranspose2d(18, 6, 3, 2),
            nn.Conv2d(6, 2, 1),
        ),
        X,
    ),
    "flattened": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(125, 9), nn.Linear(9, 2)),
        X,
    ),
    "attention": (
        lambda: nn.Sequential(nn.Linear(7, 12), Attention(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)),
        torch.randn(2, 5, 7),
    ),
    "volumes": (lambda: nn.Sequential(nn.Conv3d(1, 6, 3), nn.ReLU(), nn.Conv3d(6, 2, 2)), torch.randn(2, 1, 6, 6, 6)),
}  # fmt: skip


# -- costs ------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_costs_of_the_dense_network_equal_those_counted_by_torch(name):
    build, x = NETS[name]
    net = build()
    graph = trace(net, x)
    assert graph.cost("macs") == counted_macs(net, x)
    assert graph.cost("params") == parameters(net)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NETS)
def test_costs_of_a_removal_equal_those_of_the_smaller_network(name, seed):
    build, x = NETS[name]
    net = build()
    graph = trace(net, x)
    remove = random_units(graph, seed, (0.1, 0.4, 0.7, 1.0)[seed])
    predicted = graph.cost("macs", remove), graph.cost("params", remove)
    prune_(net, graph, remove)
    assert predicted == (counted_macs(net, x), parameters(net))
    after = trace(net, x)
    assert predicted == (after.cost("macs"), after.cost("params"))


def test_macs_of_fused_attention_count_both_of_its_products():
    class Fused(Attention):
        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            x = F.scaled_dot_product_attention(q, k, v)
            return self.proj(x.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))

    x = torch.randn(2, 5, 12)
    fused, explicit = Fused(), Attention()
    assert trace(fused, x).cost("macs") == trace(explicit, x).cost("macs") == counted_macs(explicit, x)


def test_macs_grow_with_the_batch_and_parameters_do_not():
    small, large = (trace(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(n, 3, 12, 12)) for n in (1, 4))
    assert large.cost("macs") == 4 * small.cost("macs") == 4 * 144 * 9 * 3 * 8
    assert large.cost("params") == small.cost("params") == 8 * 3 * 9 + 8


def test_a_weight_used_twice_costs_twice_the_macs_and_once_the_parameters():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    twice, once = trace(nn.Sequential(shared, nn.ReLU(), shared), X), trace(shared, X)
    assert twice.cost("macs") == 2 * once.cost("macs")
    assert twice.cost("params") == once.cost("params")


def test_an_unknown_resource_is_refused_with_a_list_of_the_known_ones():
    with pytest.raises(ValueError, match="unknown resource 'flops'; this graph has macs, params"):
        trace(Small(), X).cost("flops")


def test_widths_count_the_remaining_filters():
    graph = trace(Small(), X)
    assert graph.widths()["mix.weight"] == 10
    assert graph.widths(graph.layers["mix.weight"][:4])["mix.weight"] == 6
    assert graph.widths(graph.layers["mix.weight"][:4])["stem.weight"] == 8


# -- units ------------------------------------------------------------


def test_dimensions_share_units_exactly_if_they_are_pruned_together():
    graph = trace(Small(), X)
    layers = graph.layers
    for name in ("back.weight", "depthwise.weight"):
        assert layers[name].tolist() == layers["stem.weight"].tolist()
    sets = [
        set(layers[name])
        for name in ("stem.weight", "inner.weight", "mix.weight", "hidden.weight", "head.weight")
    ]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 8 + 6 + 10 + 7 + 2
    assert graph.bindings["mix.weight"][1].tolist() == [*layers["stem.weight"]] * 2
    assert graph.bindings["hidden.weight"][1].tolist() == np.repeat(layers["mix.weight"], 4).tolist()
    assert graph.bindings["norm.running_var"][0].tolist() == layers["stem.weight"].tolist()
    assert 1 not in graph.bindings["stem.weight"]  # the image's channels
    assert set(graph.prunable) == set().union(*sets[:-1])
    assert set(graph.pinned) >= sets[-1]
    assert graph.filter_dims["stem.weight"] == 0


def test_every_filter_is_prunable_or_pinned_with_a_reason():
    graph = trace(Small(), X)
    units = set(np.concatenate(list(graph.layers.values())).tolist())
    assert units == set(graph.prunable.tolist()) | (set(graph.pinned) & units)
    assert not set(graph.prunable.tolist()) & set(graph.pinned)


def test_two_traces_of_the_same_network_are_equal():
    first, second = trace(Small(), X), trace(Small(), X)
    assert_same(
        {name: units.tolist() for name, units in first.layers.items()},
        {name: units.tolist() for name, units in second.layers.items()},
    )
    assert first.pinned == second.pinned


def test_batch_and_image_size_do_not_change_the_units():
    one, other = trace(Small(), X), trace(Small(), torch.zeros(1, 3, 20, 16))
    assert [u.tolist() for u in one.layers.values()] == [u.tolist() for u in other.layers.values()]


def test_channels_are_not_confused_with_samples_or_pixels_of_the_same_number():
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(2), nn.Linear(64, 2)
    )
    x = torch.randn(8, 8, 8, 8)
    dense = copy.deepcopy(randomise_(net))
    graph = trace(net, x)
    assert len(graph.prunable) == 8
    remove = random_units(graph)
    dead = with_dead_filters(dense, graph, remove)
    prune_(net, graph, remove)
    assert error(dead, net, x) < 1e-5


def test_the_line_of_an_operator_does_not_depend_on_the_caller_of_trace():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    one = trace(net, X)
    other = trace(net, X)
    assert one.pinned == other.pinned
    assert not any("test_trace" in reason for reason in one.pinned.values())
    places = [[tie.where for tie in graph.evidence.tracker.ties.ties] for graph in (one, other)]
    assert places[0] == places[1] != []


# -- operators without a rule ------------------------------------------------------------


@torch.library.custom_op("tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.flip(1).contiguous()


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("tests::secret", mutates_args=())
def secret(x: Tensor) -> Tensor:
    return x.flip(1).contiguous()  # has no fake implementation


def net_with(operator: object) -> nn.Module:
    return Net(
        lambda m, x: m.head(m.tail(m.box(m.stem(x)))),
        stem=nn.Conv2d(3, 8, 1), box=Net(lambda m, x: operator(x)), tail=nn.Conv2d(8, 6, 1), head=nn.Conv2d(6, 2, 1),
    )  # fmt: skip


@pytest.mark.parametrize("operator", [mystery, secret], ids=["with_shapes", "without_shapes"])
def test_an_operator_without_a_rule_pins_its_channels_and_is_listed(operator):
    net = randomise_(net_with(operator))
    graph = trace(net, X)
    name = f"tests::{operator._name}"
    assert list(graph.unsupported) == [name]
    assert set(graph.unsupported[name]) == {"box"}
    reason = graph.pinned[int(graph.layers["stem.weight"][0])]
    assert f"without a rule ({name} in box, test_trace.py:" in reason
    assert graph.prunable.tolist() == graph.layers["tail.weight"].tolist()
    dense, remove = copy.deepcopy(net), graph.prunable[:3]
    prune_(net, graph, remove)
    assert error(with_dead_filters(dense, graph, remove), net, X) < 1e-5


def test_a_rule_of_the_user_supports_the_operator():
    operator = torch.ops.tests.mystery.default

    @rule(operator)
    def flipped(call, tracker):
        labels = list(tracker.labels(call.args[0]))
        labels[1] = tuple(ids.flip(0) for ids in labels[1])
        tracker.label(call.out, labels)

    try:
        net = randomise_(net_with(mystery))
        dense = copy.deepcopy(net)
        graph = trace(net, X)
        assert not graph.unsupported
        assert len(graph.prunable) == 8 + 6
        remove = random_units(graph)
        prune_(net, graph, remove)
        assert error(with_dead_filters(dense, graph, remove), net, X) < 1e-5
    finally:
        RULES.pop(operator)


def test_a_second_rule_for_an_operator_is_refused():
    with pytest.raises(ValueError, match=r"aten.flip.default already has a rule: flip"):
        rule(torch.ops.aten.flip)(same_labels)


# -- nothing to prune ------------------------------------------------------------


@pytest.mark.parametrize(
    "net",
    [nn.Conv2d(3, 2, 1), nn.Sequential(nn.ReLU(), nn.Flatten()), nn.BatchNorm2d(3)],
    ids=["one_layer", "no_parameters", "only_a_norm"],
)
def test_a_network_with_nothing_to_prune_has_no_prunable_units_and_exact_costs(net):
    graph = trace(net, X)
    assert graph.prunable.tolist() == []
    assert independent_units(graph).tolist() == []
    assert graph.cost("params") == parameters(net)
    assert graph.cost("macs") == counted_macs(net, X)
    before = state(net)
    assert not prune_(net, graph, [])
    assert_same(state(net), before)


def test_layers_that_the_forward_does_not_use_are_not_listed():
    net = Net(lambda m, x: m.used(x), used=nn.Conv2d(3, 2, 1), unused=nn.Conv2d(3, 8, 1))
    graph = trace(net, X)
    assert list(graph.layers) == ["used.weight"]
    assert graph.cost("params") == parameters(net)


def test_a_graph_without_a_trace_cannot_be_pruned():
    net = Small()
    real = trace(net, X)
    graph = ChannelGraph(
        real.num_units, real.bindings, real.layers, real.filter_dims, real.pinned, real.terms
    )
    assert graph.cost("macs") == real.cost("macs")
    with pytest.raises(SurgeryError, match="trace"):
        prune_(net, graph, real.prunable[:1])


# -- errors ------------------------------------------------------------


def test_the_error_of_a_model_on_its_example_is_shown():
    with pytest.raises(
        TraceError, match=r"the network raises on its example input: .*expected input.*3 channels"
    ) as caught:
        trace(Small(), torch.zeros(1, 4, 12, 12))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_error_of_a_model_for_a_missing_input_is_shown():
    with pytest.raises(TraceError, match="missing 1 required positional argument: 'x'"):
        trace(Small())


def test_any_exception_of_the_model_is_the_cause_of_the_trace_error():
    class CustomError(Exception):
        pass

    def run(m: nn.Module, x: Tensor) -> Tensor:
        raise CustomError("invalid state")

    with pytest.raises(TraceError, match="invalid state") as caught:
        trace(Net(run, a=nn.Conv2d(3, 2, 1)), X)
    assert isinstance(caught.value.__cause__, CustomError)


def test_a_keyboard_interrupt_is_not_caught():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(Net(run, a=nn.Conv2d(3, 2, 1)), X)


def test_a_model_on_the_meta_device_is_traced_without_memory():
    with torch.device("meta"):
        net = nn.Sequential(
            nn.Conv2d(3, 4096, 3), nn.ReLU(), nn.Conv2d(4096, 4096, 3), nn.ReLU(), nn.Conv2d(4096, 2, 1)
        )
        x = torch.zeros(1, 3, 32, 32)
    graph = trace(net, x)
    assert len(graph.prunable) == 2 * 4096
    assert graph.cost("params") == parameters(net)


def test_checkpointed_blocks_are_traced_like_any_other():
    from torch.utils.checkpoint import checkpoint

    plain = Net(
        lambda m, x: m.head(F.relu(m.a(F.relu(m.stem(x))))),
        stem=nn.Conv2d(3, 8, 1),
        a=nn.Conv2d(8, 6, 3),
        head=nn.Conv2d(6, 2, 1),
    )
    again = copy.deepcopy(plain)
    again.run = lambda m, x: m.head(
        checkpoint(lambda y: F.relu(m.a(F.relu(y))), m.stem(x), use_reentrant=False)
    )
    graph = trace(again, X)
    assert [u.tolist() for u in graph.layers.values()] == [
        u.tolist() for u in trace(plain, X).layers.values()
    ]
    remove = random_units(graph)
    dense = copy.deepcopy(randomise_(again))
    dead = with_dead_filters(dense, graph, remove)
    prune_(again, graph, remove)
    assert error(dead, again, X) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_scripted_submodule_is_traced_and_pruned_exactly():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 1)))
    net = Net(
        lambda m, x: m.head(m.box(m.stem(x))), stem=nn.Conv2d(3, 8, 1), box=scripted, head=nn.Conv2d(8, 2, 1)
    )
    randomise_(net)
    graph = trace(net, X)
    assert len(graph.prunable) == 8 + 6 + 8
    dead = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    remove = random_units(graph)
    for name, dims in graph.bindings.items():
        if name in graph.layers or name.endswith("bias"):
            removed = ~graph.kept(remove)[dims[0]]
            dead[name][torch.from_numpy(removed)] = 0
    before = copy.deepcopy(net.state_dict())
    net.load_state_dict(dead)
    expected = net(X)
    net.load_state_dict(before)
    prune_(net, graph, remove)
    assert torch.allclose(net(X), expected, atol=1e-5)


def test_meta_tensors_of_the_trace_do_not_remain_in_the_model():
    net = Net(lambda m, x: m.remember(m.head(m.stem(x))), stem=nn.Conv2d(3, 8, 1), head=nn.Conv2d(8, 2, 1))
    net.cache = None

    def remember(x: Tensor) -> Tensor:
        net.cache = x
        return x

    net.remember = remember
    trace(net, X)
    assert net.cache is None


def test_a_cache_has_the_same_content_after_the_trace():
    cache = {"mask": torch.ones(3)}
    net = Net(
        lambda m, x: m.head(m.stem(x) * m.cache.setdefault("new", torch.ones(()))),
        stem=nn.Conv2d(3, 8, 1),
        head=nn.Conv2d(8, 2, 1),
        cache=cache,
    )
    trace(net, X)
    assert list(cache) == ["mask"]
    assert net.cache is cache
