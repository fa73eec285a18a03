"""Tests of activation statistics: their formula, over all batches, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune.criteria.activation_deviation import ActivationDeviation, activation_deviation
from lightning_prune.criteria.collector import Collector
from lightning_prune.graph.channel_graph import ChannelGraph


def formula(batches: list[Tensor], p: int, published: bool = False) -> Tensor:
    """Compute the formula of the paper over all data at once, in float64."""
    mean_map = torch.cat(batches).double().mean(0)
    channels, h, w = mean_map.shape
    scores = []
    for k in range(channels):
        deviation = mean_map[k] - mean_map.mean(0)
        if p == 1:
            scores.append(deviation.abs().mean())
        elif published:
            scores.append(deviation.square().sum().sqrt() / (h * w))
        else:
            scores.append(deviation.square().mean().sqrt())
    return torch.stack(scores)


def computed_over(metric: ActivationDeviation, batches: list[Tensor]) -> Tensor:
    for batch in batches:
        metric.update(batch)
    return metric.compute()


def graph_of(**layers: int) -> ChannelGraph:
    units, start = {}, 0
    for name, width in layers.items():
        units[name.replace("__", ".")] = np.arange(start, start + width)
        start += width
    return ChannelGraph(start, {}, units, dict.fromkeys(units, 0), {}, {})


@pytest.mark.parametrize(("p", "form"), [(1, "fair"), (2, "fair"), (2, "published")])
@pytest.mark.parametrize(("size", "grid"), [((7, 5), 16), ((16, 16), 16), ((40, 24), None)])
def test_equals_the_formula_over_all_batches(p, form, size, grid):
    torch.manual_seed(0)
    batches = [torch.randn(n, 6, *size) + 3 for n in (4, 4, 1)]
    deviation_values = computed_over(ActivationDeviation(p, form, grid), batches)
    torch.testing.assert_close(
        deviation_values.double(), formula(batches, p, form == "published"), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("p", [1, 2])
def test_a_coarse_grid_gives_the_formula_on_pooled_maps_which_is_a_lower_bound(p):
    torch.manual_seed(0)
    batches = [torch.randn(3, 5, 32, 48) for _ in range(3)]
    deviation_values = computed_over(ActivationDeviation(p, grid=8), batches).double()
    pooled = [nn.functional.avg_pool2d(batch, (4, 6)) for batch in batches]
    torch.testing.assert_close(deviation_values, formula(pooled, p), rtol=1e-5, atol=1e-7)
    assert (deviation_values <= formula(batches, p) + 1e-7).all()


def test_the_published_form_depends_on_the_resolution_and_the_fair_form_does_not():
    small = torch.randn(2, 4, 5, 8)
    large = small.repeat_interleave(16, -1).repeat_interleave(16, -2)
    fair = [computed_over(ActivationDeviation(2, "fair", None), [maps]) for maps in (small, large)]
    published = [computed_over(ActivationDeviation(2, "published", None), [maps]) for maps in (small, large)]
    torch.testing.assert_close(fair[0], fair[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(published[0], 16 * published[1], rtol=1e-3, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 2**16))
def test_the_result_does_not_depend_on_how_data_is_split_into_batches(sizes, seed):
    data = torch.randn(sum(sizes), 4, 9, 20, generator=torch.Generator().manual_seed(seed))
    together = computed_over(ActivationDeviation(), [data])
    torch.testing.assert_close(
        computed_over(ActivationDeviation(), list(data.split(sizes))), together, rtol=1e-4, atol=1e-6
    )


def test_memory_depends_on_channels_only():
    def numbers(side: int) -> int:
        metric = ActivationDeviation()
        metric.update(torch.zeros(2, 8, side, side))
        return sum(value.numel() for value in metric.metric_state.values())

    assert numbers(32) == numbers(256) <= 8 * 256 + 2


def test_half_precision_is_summed_in_float32():
    metric = ActivationDeviation()
    for _ in range(3000):
        metric.update(torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16))
    assert metric.compute().tolist() == [1.0, 1.0]


def test_sums_are_float32_if_the_default_dtype_is_bfloat16():
    metric = ActivationDeviation()
    torch.set_default_dtype(torch.bfloat16)  # what Lightning does around a step in bf16-true
    try:
        metric.update(torch.tensor([[1.0, 3.0]]))
        assert metric.compute().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_changing_sizes_are_refused_without_a_grid_and_accepted_with_one():
    batches = [torch.zeros(1, 2, 20, 20), torch.zeros(1, 2, 24, 24)]
    computed_over(ActivationDeviation(), batches)
    with pytest.raises(ValueError, match="one size"):
        computed_over(ActivationDeviation(grid=None), batches)


def test_reset_clears_channels_and_size():
    metric = ActivationDeviation(grid=None)
    metric.update(torch.ones(1, 4, 6, 6))
    metric.reset()
    metric.update(torch.tensor([[1.0, 3.0]]))
    assert metric.compute().tolist() == [1.0, 1.0]


def test_tokens_and_linear_layers_have_channels_last():
    model = nn.Sequential(nn.Linear(3, 4))
    tokens = torch.randn(2, 5, 3)
    with Collector(graph_of(**{"0__weight": 4}), model) as collector:
        out = model(tokens)
    expected = activation_deviation(out.detach().mean(0).T)
    np.testing.assert_allclose(collector.compute()["0.weight"], expected.numpy(), rtol=1e-5)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.head = nn.Conv2d(3, 3, 3, padding=1)
        self.twin = nn.Conv2d(3, 3, 3, padding=1)
        self.twin.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.twin(self.head(self.head(x)))


def test_every_call_of_a_layer_is_collected_also_through_shared_weights():
    model, outputs = Shared(), []
    for layer in (model.head, model.twin):
        layer.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    with Collector(graph_of(stem__weight=3, head__weight=3), model) as collector:
        model(torch.randn(2, 1, 8, 8))
    assert len(outputs) == 3
    np.testing.assert_allclose(collector.compute()["head.weight"], formula(outputs, 1), rtol=1e-4)


def test_all_active_batches_are_collected_and_later_forwards_are_not():
    """The published code collects the last batch only, and the zeros of its FLOPs counter overwrite it."""
    model, batches = nn.Sequential(nn.Conv2d(1, 4, 3)), [torch.randn(2, 1, 8, 8) for _ in range(4)]
    with Collector(graph_of(**{"0__weight": 4}), model) as collector:
        outputs = [model(batch).detach() for batch in batches]
        collector.active = False
        model(torch.zeros(64, 1, 8, 8))
    model(torch.zeros(64, 1, 8, 8))
    np.testing.assert_allclose(collector.compute()["0.weight"], formula(outputs, 1), rtol=1e-4)


def test_hooks_do_not_change_gradients_and_are_removed():
    model, batch = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 1, 8, 8)
    plain = torch.autograd.grad(model(batch).square().sum(), model[0].weight)[0]
    with Collector(graph_of(**{"0__weight": 4}), model):
        observed = torch.autograd.grad(model(batch).square().sum(), model[0].weight)[0]
    assert torch.equal(plain, observed)
    assert not model[0]._forward_hooks


def test_layers_without_prunable_units_are_not_observed():
    graph = graph_of(**{"0__weight": 4, "1__weight": 2})
    graph.pinned.update({4: "output", 5: "output"})
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    assert list(Collector(graph, model).metrics) == ["0.weight"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(bad):
    model = nn.Sequential(nn.Conv2d(1, 4, 3))
    with Collector(graph_of(**{"0__weight": 4}), model) as collector:
        model(torch.ones(1, 1, 8, 8))
        model(torch.full((1, 1, 8, 8), bad))
    with pytest.raises(ValueError, match=r"activations of '0' were NaN or infinite"):
        collector.compute()


def test_grouped_transposed_filters_are_averaged_over_groups():
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2)
    graph = graph_of(**{"0__weight": 3})
    with Collector(graph, nn.Sequential(layer)) as collector:
        out = nn.Sequential(layer)(torch.randn(2, 4, 5, 5))
    expected = formula([out.detach()], 1).reshape(2, 3).mean(0)
    np.testing.assert_allclose(collector.compute()["0.weight"], expected, rtol=1e-4)


@pytest.mark.parametrize("bad", [{"p": 3}, {"form": "odd"}, {"grid": 0}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=r"must be"):
        ActivationDeviation(**bad)
