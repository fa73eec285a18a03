"""The sampled columns times a layer's matrix are its outputs, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.compensation.im2col import columns, image_axis, output_rows, position_shape, sample
from lightning_prune.compensation.layers import find_layers, kept_filters
from lightning_prune.compensation.ridge import ridge

GENERATOR = torch.Generator().manual_seed(5)
CASES = {
    "linear": (nn.Linear(6, 4), (3, 6)),
    "linear on tokens": (nn.Linear(6, 4, bias=False), (3, 5, 6)),
    "conv1d": (nn.Conv1d(4, 6, 5, padding=2, dilation=2), (3, 4, 17)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2)), (3, 4, 9, 8)),
    "conv2d same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (3, 4, 9, 8)),
    "conv2d reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 9, 8)),
    "conv2d circular": (nn.Conv2d(4, 6, 3, padding=(0, 1), padding_mode="circular"), (3, 4, 9, 8)),
    "conv2d grouped": (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 9, 8)),
    "conv2d depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (3, 4, 9, 8)),
    "conv3d": (nn.Conv3d(2, 3, (1, 2, 3), padding=1), (3, 2, 4, 5, 6)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1), (3, 4, 7)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 5, 6)),
    "transposed 2d grouped": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2), (3, 4, 5, 6)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (3, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", [20, 10**6])
def test_columns_give_the_outputs(case, number):
    module, shape = CASES[case][0].double(), CASES[case][1]
    (layer,), left_alone = find_layers(module)
    assert not left_alone
    x = torch.randn(shape, generator=GENERATOR).double()
    with torch.no_grad():
        output = module(x)
        positions = sampled(layer, output, number)
        inputs = columns(layer, x, positions, torch.float64)
        computed = (inputs @ layer.matrix(layer.weight_data())).transpose(0, 1).flatten(1)
    computed = computed + (0 if layer.bias is None else layer.bias_data())
    expected = output_rows(layer, output, positions, torch.float64)
    torch.testing.assert_close(computed, expected)
    assert torch.equal(layer.weight_of(layer.matrix(layer.weight_data())), layer.weight_data())
    assert len(expected) == min(number, output[:2].numel() // layer.in_groups(expected[:1]).numel())


def sampled(layer, output: Tensor, number: int) -> tuple[Tensor, ...]:
    shape = position_shape(layer, output)
    return sample(shape, image_axis(shape, 3), (0, 2), number, torch.Generator().manual_seed(0))


def test_filters_of_a_grouped_transposed_convolution_survive_with_their_group():
    (layer,), _ = find_layers(nn.ConvTranspose2d(4, 6, 3, groups=2))
    assert kept_filters(layer, {"weight": {0: [2, 3], 1: [0, 2]}}).tolist() == [3, 5]
    assert kept_filters(layer, {}) is None


def test_projections_of_an_attention_keep_their_thirds():
    layers, _ = find_layers(nn.MultiheadAttention(4, 2))
    kept = {"in_proj_weight": {0: [0, 1, 4, 5, 10, 11]}}
    assert [kept_filters(layer, kept).tolist() for layer in layers[:3]] == [[0, 1], [0, 1], [2, 3]]
    assert kept_filters(layers[3], kept) is None


@pytest.mark.parametrize("positions", [5, 50])
def test_ridge_solves_both_forms(positions):
    x = torch.randn(2, positions, 10, dtype=torch.float64, generator=GENERATOR)
    target = torch.randn(2, positions, 3, dtype=torch.float64, generator=GENERATOR)
    ((_, solution),) = ridge(x, target, [0.1])
    gram = x.mT @ x
    shift = 0.1 * gram.diagonal(dim1=1, dim2=2).mean(1)
    expected = torch.linalg.solve(gram + shift[:, None, None] * torch.eye(10), x.mT @ target)
    torch.testing.assert_close(solution, expected)


def test_ridge_leaves_out_what_is_singular():
    x = torch.ones(1, 8, 2) * torch.tensor([1.0, 0.0])
    assert [damping for damping, _ in ridge(x, x, [0.0, 0.1])] == [0.1]
    assert list(ridge(x * torch.nan, x, [0.1])) == []
    ((_, solution),) = ridge(0 * x, x, [0.1])
    assert not solution.any()
