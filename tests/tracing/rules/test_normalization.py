"""Norms, pooling, resampling, and operators that look up or order values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_prune import prune_, trace
from lightning_prune.testing import randomise_
from tests.support.nets import Net, random_units
from tests.support.rule_cases import (
    IMAGE,
    Case,
    check_cut,
    check_pin_reason,
    check_same_channels,
    check_statistics,
    check_units,
    conv,
    images,
    pruned_with_statistics,
)

CASES = {
    "batch_norm": Case(images(lambda m, x: F.relu(m.n(x)), n=lambda: nn.BatchNorm2d(8)), 8),
    "batch_norm_without_parameters": Case(
        images(lambda m, x: F.relu(m.n(x)), n=lambda: nn.BatchNorm2d(8, affine=False)), 8, dead=False
    ),
    "instance_norm": Case(images(lambda m, x: m.n(x), n=lambda: nn.InstanceNorm2d(8, affine=True)), 8),
    "instance_norm_with_statistics": Case(
        images(lambda m, x: m.n(x), n=lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), 8
    ),
    "group_norm_of_one_channel_each": Case(images(lambda m, x: m.n(x), n=lambda: nn.GroupNorm(8, 8)), 8),
    "shuffled_by_an_index_tensor": Case(
        images(lambda m, x: x[:, torch.tensor([3, 1, 2, 0, 7, 6, 5, 4])]), 0,
        pinned={"stem.weight": "is picked by an index tensor"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_prunable_units_and_pin_reasons(name):
    check_units(CASES[name])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_cut_matches_oracles_and_predicted_costs(name, seed):
    check_cut(CASES[name], seed)


SAME_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "max_pool_with_indices": lambda x: F.max_pool2d(x, 3, return_indices=True)[0],
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "lp_pool": lambda x: F.lp_pool2d(x, 2, 2),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 3),
    "adaptive_avg_pool_to_one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, 3),
    "cumulative_sum_of_pixels": lambda x: x.cumsum(3),
    "sorted_pixels": lambda x: x.sort(3).values,
    "upsample_nearest": lambda x: F.interpolate(x, scale_factor=2),
    "upsample_nearest_exact": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "upsample_bilinear": lambda x: F.interpolate(x, size=(12, 12), mode="bilinear", align_corners=True),
    "upsample_bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "downsample_antialiased": lambda x: F.interpolate(x, size=5, mode="bilinear", antialias=True),
    "pad_reflect": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "pad_replicate": lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"),
    "pixels_from_an_index_tensor": lambda x: x[:, :, torch.tensor([0, 3, 2])],
    "sampled_on_a_grid": lambda x: F.grid_sample(
        x, torch.linspace(-1, 1, 2 * 5 * 5 * 2).view(2, 5, 5, 2).double(), align_corners=True
    ),
    "unpooled_pixels": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
}


@pytest.mark.parametrize("name", SAME_CHANNELS)
def test_operator_that_keeps_channels_frees_all_units(name):
    check_same_channels(SAME_CHANNELS[name])


STATISTICS: dict[str, tuple[Callable[[nn.Module, Tensor, list[int]], Tensor], dict[str, Any]]] = {
    "layer_norm": (
        lambda m, x, k: F.layer_norm(x[..., k], (len(k),), m.n.weight[k], m.n.bias[k]),
        {"n": lambda: nn.LayerNorm(12)},
    ),
    "layer_norm_without_parameters": (
        lambda m, x, k: F.layer_norm(x[..., k], (len(k),)),
        {"n": lambda: nn.LayerNorm(12, elementwise_affine=False)},
    ),
    "rms_norm": (
        lambda m, x, k: F.rms_norm(x[..., k], (len(k),), m.n.weight[k], 1e-6),
        {"n": lambda: nn.RMSNorm(12, eps=1e-6)},
    ),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_taken_over_the_remaining_features(name):
    check_statistics(*STATISTICS[name])


PINNED = {
    "cumulative sum": (
        lambda x: x.cumsum(1),
        r"picked or ordered by values \(aten::cumsum, test_normalization",
    ),
    "sorting": (lambda x: x.sort(1).values, r"picked or ordered by values \(aten::sort"),
    "pooling over channels": (
        lambda x: F.max_pool1d(x.flatten(2).transpose(1, 2), 2).transpose(1, 2).view(2, 4, 8, 8),
        "is pooled or resampled along its channels",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_pin_reason_names_the_operator(name):
    check_pin_reason(*PINNED[name])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_keeps_equal_groups_and_takes_statistics_of_the_remaining_channels(groups):
    x = torch.randn(IMAGE).double()
    dense, small, kept = pruned_with_statistics(
        images(lambda m, x: m.n(x), n=lambda: nn.GroupNorm(groups, 8)), x, "stem.weight", seed=1
    )
    by_group = [[k % (8 // groups) for k in kept if k // (8 // groups) == g] for g in range(groups)]
    assert len(kept) == 4
    assert all(positions == by_group[0] for positions in by_group)
    normed = F.group_norm(dense.stem(x)[:, kept], groups, dense.n.weight[kept], dense.n.bias[kept])
    expected = F.conv2d(normed, dense.head.weight[:, kept], dense.head.bias)
    assert small.n.num_groups == groups
    assert torch.allclose(small(x), expected, atol=1e-12)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("norm", [old_weight_norm, parametrizations.weight_norm], ids=["old", "parametrised"])
def test_weight_under_weight_norm_loses_filters_and_inputs(norm):
    x = torch.randn(IMAGE).double()

    def build() -> nn.Module:
        return Net(
            lambda m, x: m.head(F.relu(m.b(F.relu(m.a(x))))),
            a=norm(conv(3, 8)),
            b=norm(conv(8, 6)),
            head=conv(6, 2),
        )

    dense, small = (randomise_(build()).double().eval() for _ in range(2))
    small.load_state_dict(dense.state_dict())
    graph = trace(small, x)
    assert len(graph.prunable) == 8 + 6
    record = prune_(small, graph, random_units(graph, 0, 0.5, among=graph.prunable))
    kept_a, kept_b = record.kept["a.bias"][0], record.kept["b.bias"][0]
    assert 0 < len(kept_a) < 8
    assert 0 < len(kept_b) < 6
    g, v = (
        (dense.b.weight_g, dense.b.weight_v)
        if norm is old_weight_norm
        else (dense.b.parametrizations.weight.original0, dense.b.parametrizations.weight.original1)
    )
    v = v[kept_b][:, kept_a]
    weight = g[kept_b] * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    hidden = F.conv2d(F.relu(dense.a(x))[:, kept_a], weight, dense.b.bias[kept_b], padding=1)
    expected = F.conv2d(F.relu(hidden), dense.head.weight[:, kept_b], dense.head.bias, padding=1)
    assert torch.allclose(small(x), expected, atol=1e-12)


def test_inputs_of_a_weight_under_weight_norm_are_statistics_units():
    net = Net(
        lambda m, x: m.head(m.b(m.a(x))),
        a=conv(3, 8),
        b=parametrizations.weight_norm(conv(8, 6)),
        head=conv(6, 2),
    )
    graph = trace(net, torch.zeros(IMAGE))
    assert set(graph.layers["a.weight"]) <= set(graph.statistics_units)


def old_spectral_norm(layer: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(layer)


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "norm", [old_spectral_norm, parametrizations.spectral_norm], ids=["old", "parametrised"]
)
def test_weight_under_spectral_norm_loses_filters_and_inputs(norm):
    """The norm of the remaining weight is computed with the remaining entries of the power iteration's vectors."""
    x = torch.randn(IMAGE).double()

    def build() -> nn.Module:
        return Net(lambda m, x: m.head(m.b(m.a(x))), a=conv(3, 8), b=norm(conv(8, 6)), head=conv(6, 2))

    dense, small = (randomise_(build()).double().eval() for _ in range(2))
    small.load_state_dict(dense.state_dict())
    graph = trace(small, x)
    old = norm is old_spectral_norm
    assert len(graph.prunable) == 14
    assert set(graph.prunable) <= set(graph.statistics_units)
    record = prune_(small, graph, [*graph.layers["a.weight"][:3], *graph.layers[weight_of_b(old)][1:5]])
    inputs, kept = record.kept["a.bias"][0], record.kept["b.bias"][0]
    inner = dense.b if old else dense.b.parametrizations.weight[0]
    weight = (dense.b.weight_orig if old else dense.b.parametrizations.weight.original)[kept][:, inputs]
    u, v = (inner.weight_u, inner.weight_v) if old else (inner._u, inner._v)
    weight = weight / torch.dot(u[kept], weight.flatten(1) @ v.view(8, -1)[inputs].flatten())
    hidden = F.conv2d(x, dense.a.weight[inputs], dense.a.bias[inputs], padding=1)
    hidden = F.conv2d(hidden, weight, dense.b.bias[kept], padding=1)
    assert torch.allclose(small(x), F.conv2d(hidden, dense.head.weight[:, kept], dense.head.bias, padding=1))


def weight_of_b(old: bool) -> str:
    return "b.weight_orig" if old else "b.parametrizations.weight.original"
