"""Tests of IPAD against its formula, and of norms against Torch-Pruning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune.criteria import IPAD, L1, L2, Random, ipad_importance, per_unit
from lightning_prune.graph.channel_graph import ChannelGraph


class Net(nn.Module):
    """Two convolutions that a sum couples, and an uncoupled one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 1)
        self.c = nn.Conv2d(4, 5, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x + self.b(x))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def graph() -> ChannelGraph:
    layers = {"a.weight": np.arange(4), "b.weight": np.arange(4), "c.weight": np.arange(4, 9)}
    return ChannelGraph(10, {}, layers, dict.fromkeys(layers, 0), {9: "no filter"}, {})


def formula_scores(
    net: Net, batches: list[Tensor], omega: float, p: int, published: bool
) -> dict[str, list[float]]:
    """Return omega / n_l * ||W_k||_p + (1 - omega) * 10 * ADC_k of each filter, over all data at once."""
    outputs: dict[str, list[Tensor]] = {"a": [], "b": [], "c": []}
    for batch in batches:
        a = net.a(batch)
        b = net.b(a)
        for name, out in zip(outputs, (a, b, net.c(a + b)), strict=True):
            outputs[name].append(out)
    scores: dict[str, list[float]] = {}
    for name, outs in outputs.items():
        layer, mean_map = getattr(net, name), torch.cat(outs).mean(0)
        c_in, (kh, kw) = layer.in_channels, layer.kernel_size
        _, h, w = mean_map.shape
        scores[name] = []
        for k in range(layer.out_channels):
            d = mean_map[k] - mean_map.mean(0)
            if p == 1:
                norm, adc = layer.weight[k].abs().sum(), d.abs().sum() / (h * w)
            else:
                norm = (layer.weight[k] ** 2).sum().sqrt()
                adc = (d**2).sum().sqrt() / (h * w) if published else ((d**2).sum() / (h * w)).sqrt()
            scores[name].append((omega / (c_in * kh * kw) * norm + (1 - omega) * 10 * adc).item())
    return scores


@pytest.mark.parametrize("omega", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize(("p", "deviation"), [(1, "fair"), (2, "fair"), (2, "published")])
def test_ipad_equals_the_formula_filter_by_filter(net, graph, omega, p, deviation):
    batches = [torch.randn(n, 3, 11, 9) for n in (4, 4, 2)]
    criterion = IPAD(omega=omega, p=p, deviation=deviation)
    statistics = {}
    if (observer := criterion.observer(graph, net)) is not None:
        observer.attach()
        for batch in batches:
            net(batch)
        observer.detach()
        statistics = observer.compute()
    importance_values = criterion(graph, net, statistics)
    scores = formula_scores(net, batches, omega, p, deviation == "published")
    coupled = [(a + b) / 2 for a, b in zip(scores["a"], scores["b"], strict=True)]
    np.testing.assert_allclose(importance_values[:9], coupled + scores["c"], rtol=1e-4)
    assert importance_values[9] == np.inf


def test_global_scale_makes_each_term_sum_to_its_weight(net, graph):
    statistics = {name: np.random.default_rng(0).random(len(units)) for name, units in graph.layers.items()}
    scores = ipad_importance(graph, net, statistics, omega=0.3, scale="global", reduction="sum")
    assert scores[:9].sum() == pytest.approx(1)
    only_weights = ipad_importance(graph, net, statistics, omega=1, reduction="sum")[:9]
    only_maps = ipad_importance(graph, net, statistics, omega=0, scale="global", reduction="sum")[:9]
    expected = 0.3 * only_weights / only_weights.sum() + 0.7 * only_maps
    np.testing.assert_allclose(scores[:9], expected)


def test_a_layer_that_was_not_observed_gets_the_mean_score(net, graph):
    statistics = {"a.weight": np.array([1.0, 2, 3, 4]), "c.weight": np.full(5, 10.0)}
    scores = ipad_importance(graph, net, statistics, omega=0, scale=1.0)
    neutral = (1 + 2 + 3 + 4 + 50) / 9
    np.testing.assert_allclose(scores[:4], (np.array([1.0, 2, 3, 4]) + neutral) / 2)


def test_ipad_without_statistics_raises(net, graph):
    with pytest.raises(ValueError, match="needs activation statistics"):
        IPAD(omega=0.5)(graph, net, {})


def test_omega_one_observes_nothing(net, graph):
    assert IPAD(omega=1).observer(graph, net) is None
    assert IPAD(omega=0.99).observer(graph, net) is not None


@pytest.mark.parametrize(
    "bad",
    [{"omega": -0.1}, {"omega": 1.1}, {"omega": float("nan")}, {"p": 3}, {"deviation": "x"}, {"scale": "x"}],
)
def test_bad_arguments_of_ipad(bad):
    with pytest.raises(ValueError, match=r"must"):
        IPAD(**bad)


@pytest.mark.parametrize(
    ("reduction", "expected"), [("mean", [2.5, 2, np.inf]), ("sum", [5, 4, np.inf]), ("max", [4, 3, np.inf])]
)
def test_reduction_over_coupled_filters(reduction, expected):
    layers = {"a": np.array([0, 1]), "b": np.array([1, 0])}
    graph = ChannelGraph(3, {}, layers, {"a": 0, "b": 0}, {}, {})
    scores = per_unit(graph, {"a": np.array([1.0, 3.0]), "b": np.array([1.0, 4.0])}, reduction)
    assert scores.tolist() == expected


def test_unknown_reduction():
    with pytest.raises(ValueError, match="'mean' or 'sum' or 'max'"):
        per_unit(ChannelGraph(0, {}, {}, {}, {}, {}), {}, "median")  # type: ignore[arg-type]


@pytest.mark.parametrize(("criterion", "p"), [(L1(), 1), (L2(), 2)])
def test_norms_equal_torch_pruning(net, graph, criterion, p):
    """Torch-Pruning sums ``|w|^p`` without the root; its reduction ``"first"`` uses the filters alone."""
    tp = pytest.importorskip("torch_pruning")
    dependency = tp.DependencyGraph().build_dependency(net, example_inputs=torch.randn(1, 3, 8, 8))
    importance = tp.importance.MagnitudeImportance(p=p, group_reduction="first", normalizer=None)
    uncoupled = {name: graph.layers[name] for name in ("a.weight", "c.weight")}
    ours = criterion(ChannelGraph(10, {}, uncoupled, graph.filter_dims, {}, {}), net, {})
    for layer, units in ((net.a, uncoupled["a.weight"]), (net.c, uncoupled["c.weight"])):
        all_filters = list(range(layer.out_channels))
        group = dependency.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=all_filters)
        np.testing.assert_allclose(ours[units], importance(group).numpy() ** (1 / p), rtol=1e-5)


def test_filters_of_transposed_convolutions_are_in_the_second_dimension():
    layer = nn.Sequential(nn.ConvTranspose2d(2, 3, 2))
    graph = ChannelGraph(3, {}, {"0.weight": np.arange(3)}, {"0.weight": 1}, {}, {})
    expected = layer[0].weight.detach().abs().sum((0, 2, 3))
    np.testing.assert_allclose(L1()(graph, layer, {}), expected, rtol=1e-5)
    per_weight = expected / (2 * 2 * 2)
    np.testing.assert_allclose(IPAD(omega=1)(graph, layer, {}), per_weight, rtol=1e-5)


def test_random_is_reproducible_and_differs_by_seed(net, graph):
    assert np.array_equal(Random(3)(graph, net, {}), Random(3)(graph, net, {}))
    assert not np.array_equal(Random(3)(graph, net, {}), Random(4)(graph, net, {}))
