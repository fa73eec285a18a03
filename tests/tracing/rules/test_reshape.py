"""Reshapes, by constants, attributes and sizes of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import prune_, trace
from lightning_prune.testing import with_zeroed_consumers
from tests.support.nets import Net
from tests.support.rule_cases import Case, check_cut, check_same_channels, check_units, conv, images


def shuffled(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


CASES = {
    "flatten_to_linear_over_several_pixels": Case(
        lambda: nn.Sequential(
            conv(3, 6), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 5), nn.ReLU(), nn.Linear(5, 2)
        ),
        6 + 5,
    ),
    "view_with_a_free_size": Case(
        lambda: Net(
            lambda m, x: m.head(m.a(x).view(x.shape[0], -1)), a=conv(3, 6), head=nn.Linear(6 * 64, 2)
        ),
        6,
    ),
    "view_by_a_number_in_the_code": Case(
        lambda: Net(lambda m, x: m.head(m.a(x).view(2, 6 * 64)), a=conv(3, 6), head=nn.Linear(6 * 64, 2)),
        0, pinned={"a.weight": "."},
    ),
    "channel_shuffle_by_a_number": Case(images(lambda m, x: shuffled(x, 2)), 4),
    "channel_shuffle_by_an_attribute": Case(images(lambda m, x: shuffled(x, m.groups), groups=4), 2),
    "channel_shuffle_by_a_computed_number": Case(images(lambda m, x: shuffled(x, m.groups // 2), groups=4), 4),
    "unflatten_by_a_number": Case(
        images(lambda m, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), 4
    ),
    "unflatten_by_its_own_shape": Case(
        images(lambda m, x: x.unflatten(1, (4, x.shape[1] // 4)).transpose(1, 2).flatten(1, 2)), 2
    ),
    "half_of_the_channels_moved_into_the_batch": Case(
        images(lambda m, x: x.reshape(x.shape[0] * 2, x.shape[1] // 2, 8, 8).relu().reshape(x.shape)), 4
    ),
    "view_by_another_layers_attribute": Case(
        lambda: Net(
            lambda m, x: m.head(F.adaptive_avg_pool2d(m.a(x), 2).view(-1, m.a.out_channels * 4)),
            a=conv(3, 8), head=nn.Linear(32, 2),
        ),
        8,
    ),
    "view_by_an_attribute_of_channels_times_pixels": Case(
        lambda: Net(
            lambda m, x: m.head(F.adaptive_avg_pool2d(m.a(x), 2).view(-1, m.width)),
            a=conv(3, 8), head=nn.Linear(32, 2), width=32,
        ),
        8,
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
    "flatten_and_unflatten": lambda x: x.flatten(2).unflatten(2, (8, 8)),
    "windows_and_back": lambda x: x.view(2, -1, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).flatten(0, 2),
}


@pytest.mark.parametrize("name", SAME_CHANNELS)
def test_operator_that_keeps_channels_frees_all_units(name):
    check_same_channels(SAME_CHANNELS[name])


class ClassToken(nn.Module):
    """A token of shape (1, 1, width) that is flattened before it is added, as einops' repeat does."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.embed, self.token, self.out = (
            nn.Linear(3, 8),
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Linear(8, 2),
        )
        self.sizes = sizes

    def forward(self, x):
        token = self.token.reshape(self.sizes).unsqueeze(0).expand(len(x), -1).unsqueeze(1)
        return self.out(torch.cat([token, self.embed(x)], dim=1))


@pytest.mark.parametrize("sizes", [(-1,), (8,)], ids=["free", "attribute"])
def test_flattened_token_leaves_its_channels_apart(sizes):
    dense, x = ClassToken(sizes), torch.randn(2, 5, 3)
    graph = trace(dense, x)
    units = graph.layers["embed.weight"]
    assert len(set(units.tolist())) == 8
    pruned = copy.deepcopy(dense)
    graph = trace(pruned, x)
    prune_(pruned, graph, units[[0, 3]])
    torch.testing.assert_close(pruned(x), with_zeroed_consumers(dense, graph, units[[0, 3]])(x))


class HeadSize(nn.Module):
    """Attention that passes the width of a head, and leaves the number of heads free, as ViLT does."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_head_size, self.all_head_size = 4, 12
        self.query, self.key, self.value, self.out = (nn.Linear(n, m) for n, m in ((5, 12),) * 3 + ((12, 2),))

    def forward(self, x):
        shape = (*x.shape[:-1], -1, self.attention_head_size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / self.attention_head_size**0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2)
        return self.out(mixed.reshape(*mixed.shape[:2], self.all_head_size))


def test_heads_are_removed_and_not_their_width():
    dense, x = HeadSize(), torch.randn(2, 5, 5)
    pruned = copy.deepcopy(dense)
    graph = trace(pruned, x)
    heads = graph.layers["value.weight"].reshape(3, 4)
    assert [len(set(head.tolist())) for head in heads] == [1, 1, 1]
    assert not len(graph.statistics_units)
    prune_(pruned, graph, heads[1, :1])
    assert (pruned.attention_head_size, pruned.all_head_size) == (4, 8)
    torch.testing.assert_close(pruned(x), with_zeroed_consumers(dense, graph, heads[1, :1])(x))


class Chosen(nn.Module):
    """Flatten the maps that values choose, as a detector does; the example may choose none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(32, 2)

    def forward(self, x):
        chosen = torch.where(x.amax((1, 2, 3)) > 10)[0]
        return self.out(self.conv(x)[chosen].flatten(1))


@pytest.mark.parametrize(
    "example", [torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 20.0)], ids=["none", "all"]
)
def test_channels_are_followed_where_values_chose_nothing(example):
    dense, x = Chosen(), torch.rand(2, 3, 4, 4) + 10
    pruned = copy.deepcopy(dense)
    graph = trace(pruned, example)
    units = graph.layers["conv.weight"][[1, 6]]
    assert graph.bindings["out.weight"][1].tolist() == graph.layers["conv.weight"].repeat(4).tolist()
    prune_(pruned, graph, units)
    torch.testing.assert_close(pruned(x), with_zeroed_consumers(dense, graph, units)(x))
