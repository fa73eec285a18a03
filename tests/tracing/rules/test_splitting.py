"""Parts of a dimension: split, chunk, slice, select."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import prune_, trace
from lightning_prune.testing import with_zeroed_consumers
from tests.support.rule_cases import (
    TOKENS,
    Case,
    check_cut,
    check_pin_reason,
    check_same_channels,
    check_units,
    conv,
    images,
    tokens,
)


def rotary(m: nn.Module, x: Tensor) -> Tensor:
    q = m.q(x)
    half = q.shape[-1] // 2
    return m.o(q + torch.cat([-q[..., half:], q[..., :half]], -1) * m.sine)


CASES = {
    "chunk": Case(images(lambda m, x: torch.mul(*x.chunk(2, 1)), 4), 4),
    "chunk_and_concat_all_parts": Case(
        images(
            lambda m, x: torch.cat([*x.chunk(2, 1), m.a(x.chunk(2, 1)[1])], 1), 12, a=lambda: conv(4, 4)
        ),
        4 + 4,
    ),
    "split_equally_by_an_attribute": Case(
        images(lambda m, x: torch.mul(*x.split(m.width, 1)), 4, width=4), 4
    ),
    "split_unequally_by_attributes": Case(
        images(
            lambda m, x: torch.cat([m.a(x.split([m.p, m.q], 1)[0]), m.b(x.split([m.p, m.q], 1)[1])], 1), 9,
            a=lambda: conv(3, 4), b=lambda: conv(5, 5), p=3, q=5,
        ),
        8 + 4 + 5,
    ),
    "split_unequally_by_a_tuple": Case(
        images(lambda m, x: m.a(x.split(m.widths, 1)[1]), 4, a=lambda: conv(5, 4), widths=(3, 5)), 8 + 4
    ),
    "split_by_numbers_in_the_code": Case(
        images(lambda m, x: m.a(x.split([3, 5], 1)[1]), 4, a=lambda: conv(5, 4)),
        4, pinned={"stem.weight": "written as the number"},
    ),
    "split_equally_by_a_number_in_the_code": Case(
        images(lambda m, x: torch.mul(*x.split(4, 1)), 4),
        0, pinned={"stem.weight": "written as the number 4"},
    ),
    "slices_at_an_attribute": Case(
        images(lambda m, x: m.a(x[:, : m.p]) + m.b(x[:, m.p :]), 4, a=lambda: conv(3, 4), b=lambda: conv(5, 4), p=3),
        8 + 4,
    ),
    "slices_at_half_of_its_own_shape": Case(
        images(lambda m, x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :], 4), 4
    ),
    "gates_after_an_attribute_of_which_one_is_left": Case(  # timm's focalnet
        images(lambda m, x: m.a(x)[:, : m.p].sum(1, keepdim=True) + m.b(x) * m.a(x)[:, m.p :], 5,
               a=lambda: conv(8, 4), b=lambda: conv(8, 5), p=3), 8 + 3 + 5, dead=False, zeroed=False,
        pinned={"a.weight": "is the only channel that a slice leaves"},
    ),
    "slice_at_a_number_in_the_code": Case(
        images(lambda m, x: m.a(x[:, :3]), 4, a=lambda: conv(3, 4)), 4 + 5,
        pinned={"stem.weight": "is sliced at a number in the code"},
    ),
    "every_second_channel": Case(images(lambda m, x: x[:, ::2] + x[:, 1::2], 4), 4),
    "narrow_by_an_attribute": Case(images(lambda m, x: x.narrow(1, 0, m.p), 3, p=3), 8),
    "select_one_channel": Case(
        images(lambda m, x: x * x[:, 0:1] + x.select(1, 1)[:, None]), 6, dead=False,
        pinned={"stem.weight": "is picked by its number|is sliced at a number in the code"},
    ),
    "unbind": Case(
        images(lambda m, x: torch.stack(x.unbind(1)[::-1], 1)), 0,
        pinned={"stem.weight": "is taken apart index by index"},
    ),
    "slice_between_two_attributes": Case(
        images(lambda m, x: m.a(x[:, m.p : m.q]), 4, a=lambda: conv(3, 4), p=2, q=5), 4 + 2
    ),
    "rotary_positions": Case(
        tokens(
            rotary, q=lambda: nn.Linear(12, 8), o=lambda: nn.Linear(8, 12),
            sine=lambda: nn.Buffer(torch.rand(5, 8)),
        ),
        12 + 4 + 12, TOKENS,
    ),
    "halves_by_tensor_split": Case(images(lambda m, x: sum(torch.tensor_split(x, 2, 1)), 4), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_prunable_units_and_pin_reasons(name):
    check_units(CASES[name])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_cut_matches_oracles_and_predicted_costs(name, seed):
    check_cut(CASES[name], seed)


SAME_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "crop": lambda x: x[:, :, 1:-1, 2:6],
    "crop_with_ellipsis": lambda x: x[..., 1:5],
    "every_second_pixel": lambda x: x[:, :, ::2, ::2],
    "batch_halves": lambda x: torch.cat(x.split(1, 0), 0),
    "batch_by_tensor_split": lambda x: torch.cat(torch.tensor_split(x, 2), 0),
}


@pytest.mark.parametrize("name", SAME_CHANNELS)
def test_operator_that_keeps_channels_frees_all_units(name):
    check_same_channels(SAME_CHANNELS[name])


PINNED = {
    "unequal parts": (
        lambda x: torch.cat(torch.tensor_split(x, 3, 1), 1),
        r"split into unequal parts .* \(aten::tensor_split",
    ),
    "parts at numbers": (
        lambda x: torch.cat(torch.tensor_split(x, (2, 4, 6), 1), 1),
        r"sliced at (a number|numbers) in the code",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_pin_reason_names_the_operator(name):
    check_pin_reason(*PINNED[name])


class Focal(nn.Module):
    """Split a projection by the width of its input and a number of gates, as FocalNet does."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.levels, self.computed = 2, computed
        self.embed, self.project, self.out = nn.Linear(3, 6), nn.Linear(6, 15), nn.Linear(6, 2)

    def forward(self, x):
        x = self.embed(x)
        width = x.shape[-1] * 2 // 2 if self.computed else x.shape[-1]
        query, context, gates = torch.split(self.project(x), (width, width, self.levels + 1), -1)
        return self.out(query * context * gates.sum(-1, keepdim=True))


def test_parts_follow_the_width_of_another_tensor():
    dense, x = Focal(False), torch.randn(2, 5, 3)
    pruned = copy.deepcopy(dense)
    graph = trace(pruned, x)
    width, project = graph.layers["embed.weight"], graph.layers["project.weight"]
    assert project[:12].tolist() == [*width.tolist(), *width.tolist()]
    prune_(pruned, graph, width[[0, 4]])
    assert pruned.project.out_features == 15 - 4
    torch.testing.assert_close(pruned(x), with_zeroed_consumers(dense, graph, width[[0, 4]])(x))


def test_widths_whose_computed_number_sizes_a_split_stay():
    graph = trace(Focal(True), torch.randn(2, 5, 3))
    assert {"embed.weight", "project.weight"} <= graph.layers.keys()
    assert not len(graph.prunable)
