"""Inputs, outputs, modes and layers of whole networks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import prune_, trace
from lightning_prune.testing import randomise_, with_dead_filters
from tests.support.nets import Net, counted_macs, cut, parameters, random_units
from tests.support.rule_cases import IMAGE, OUTPUT, TOKENS, conv, images


def test_frozen_network_is_pruned_like_a_trainable_one():
    x = torch.randn(IMAGE).double()
    build = images(lambda m, x: F.relu(m.a(F.relu(x))), 6, a=lambda: conv(8, 6))
    torch.manual_seed(0)
    free = cut(build().double(), x)
    torch.manual_seed(0)
    frozen = cut(build().double().requires_grad_(False), x)
    assert frozen.remove.tolist() == free.remove.tolist()
    assert frozen.record == free.record
    assert len(free.remove) == 7
    assert frozen.dead < 1e-12
    assert not any(p.requires_grad for p in frozen.model.parameters())


def test_several_nested_and_keyword_inputs():
    def run(m: nn.Module, first: Tensor, more: dict[str, list[Tensor]], *, gate: Tensor) -> Tensor:
        return m.head(torch.cat([m.a(first) * m.g(gate), m.b(more["images"][0])], 1))

    net = Net(run, a=conv(3, 4), b=conv(5, 6), g=conv(1, 4), head=conv(10, 2)).double()
    first, second, gate = (torch.randn(2, n, 8, 8).double() for n in (3, 5, 1))
    small = copy.deepcopy(randomise_(net).eval())
    graph = trace(small, first, {"images": [second]}, gate=gate)
    assert len(graph.prunable) == 4 + 6
    remove = random_units(graph)
    dead = with_dead_filters(net, graph, remove)
    prune_(small, graph, remove)
    expected = dead(first, {"images": [second]}, gate=gate)
    assert torch.allclose(small(first, {"images": [second]}, gate=gate), expected, atol=1e-12)
    assert parameters(small) < parameters(net)


@dataclass
class Outputs:
    logits: Tensor
    features: list[Tensor]


class OwnDict(dict[str, Any]):
    """A dictionary of a class that torch's pytree does not know."""


class OwnList(list[Any]):
    """A list of a class that torch's pytree does not know."""


class Slotted:
    __slots__ = ("logits", "rest")

    def __init__(self, logits: Tensor, rest: Any) -> None:
        self.logits, self.rest = logits, rest


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: {"out": a, "aux": {"deep": b}},
        lambda a, b: (a, [b, None]),
        lambda a, b: Outputs(a, [b]),
        lambda a, b: OwnDict(out=a, aux=OwnList([b])),
        lambda a, b: Slotted(a, {"aux": OwnDict(b=b)}),
    ],
    ids=["dictionary", "tuple_and_list", "dataclass", "own_collections", "slots"],
)
def test_all_nested_outputs_keep_their_channels(wrap):
    def run(m: nn.Module, x: Tensor) -> Any:
        x = m.stem(x)
        return wrap(m.head(x), m.side(x))

    outcome = cut(
        Net(run, stem=conv(3, 8), head=conv(8, 2), side=conv(8, 5)).double(), torch.randn(IMAGE).double()
    )
    assert outcome.graph.pinned[outcome.graph.layers["head.weight"][0]] == OUTPUT
    assert outcome.graph.pinned[outcome.graph.layers["side.weight"][0]] == OUTPUT
    assert len(outcome.graph.prunable) == 8
    assert len(outcome.remove) == 4
    assert outcome.dead < 1e-12


def test_branch_on_a_value_follows_the_example_input_and_adds_a_note():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.norm(m.stem(x))
        x = m.a(x) if x.sum() > 1e9 else m.b(x)
        return m.head(F.relu(m.mid(F.relu(x))))

    net = Net(
        run,
        stem=conv(3, 8),
        norm=nn.BatchNorm2d(8),
        a=conv(8, 6),
        b=conv(8, 6),
        mid=conv(6, 7),
        head=conv(7, 2),
    ).double()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    outcome = cut(net, torch.randn(IMAGE).double())
    assert any("branches" in note for note in outcome.graph.notes)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert "b.weight" in outcome.graph.layers
    assert "a.weight" not in outcome.graph.layers
    assert len(outcome.remove) == 4  # of `mid`: what the other branch could read or write stays
    assert outcome.dead < 1e-12


class Auxiliary(nn.Module):
    """Network with a second head that exists only in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3, 8), conv(8, 6), conv(6, 2)
        self.side, self.side_head = conv(8, 5), conv(5, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        out = self.head(F.relu(self.body(x)))
        return (out, self.side_head(F.relu(self.side(x)))) if self.training else out


def test_auxiliary_head_that_exists_only_in_train_mode_is_pruned():
    x = torch.randn(IMAGE).double()
    outcome = cut(Auxiliary().double(), x, share=0.6)
    assert len(outcome.graph.prunable) == 8 + 6 + 5
    assert outcome.dead < 1e-12
    dead = with_dead_filters(outcome.dense, outcome.graph, outcome.remove)
    for want, have in zip(dead.train()(x), outcome.model.train()(x), strict=True):
        assert torch.allclose(want, have, atol=1e-12)
    assert outcome.model.side.out_channels < 5


def test_macs_are_those_of_an_eval_forward_without_the_auxiliary_head():
    x = torch.randn(IMAGE)
    net = Auxiliary()
    assert trace(net, x).cost("macs") == counted_macs(net, x)
    assert trace(net, x).cost("params") == parameters(net)


def test_norm_after_global_pooling_is_traced_with_a_batch_of_one():
    net = nn.Sequential(
        conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
    ).double()
    outcome = cut(net, torch.randn(1, 3, 8, 8).double())
    assert not outcome.graph.notes
    assert len(outcome.graph.prunable) == 8
    assert outcome.dead < 1e-12


@pytest.mark.parametrize("training", [False, True])
def test_network_that_runs_in_one_mode_only_is_traced_in_it_and_adds_a_note(training):
    def run(m: nn.Module, x: Tensor) -> Tensor:
        if m.training != training:
            raise RuntimeError("not in this mode, please")
        return m.head(F.relu(m.stem(x)))

    graph = trace(Net(run, stem=conv(3, 8), head=conv(8, 2)), torch.zeros(IMAGE))
    assert len(graph.prunable) == 8
    assert graph.notes == [f"{'eval' if training else 'train'} mode cannot be run: not in this mode, please"]


def test_tied_embedding_and_decoder_share_one_table():
    def run(m: nn.Module, words: Tensor) -> Tensor:
        return F.linear(F.relu(m.mix(m.table(words))), m.table.weight)

    net = Net(run, table=nn.Embedding(20, 8), mix=nn.Linear(8, 8)).double()
    words = torch.randint(0, 20, (2, 5))
    outcome = cut(net, words)
    assert len(outcome.graph.prunable) == 8
    assert outcome.dead < 1e-12
    assert outcome.model.table.weight.shape == (20, 8 - len(outcome.remove))


def recurrent(kind: type[nn.Module]) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(m.cell(F.relu(m.embed(x)))[0])

    return Net(run, embed=nn.Linear(7, 8), cell=kind(8, 6, batch_first=True), head=nn.Linear(6, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # float32 is oneDNN's on the CPU
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_hidden_units_of_a_recurrent_layer_are_removed_from_all_gates(kind, dtype):
    outcome = cut(recurrent(kind).to(dtype), torch.randn(TOKENS).to(dtype))
    assert len(outcome.graph.prunable) == 8 + 6
    assert len(outcome.remove) == 7
    assert outcome.dead < (1e-12 if dtype is torch.float64 else 1e-5)
    hidden = outcome.model.head.in_features
    assert hidden < 6
    assert outcome.model.cell.hidden_size == hidden
    assert outcome.model.cell.weight_hh_l0.shape == (hidden * (4 if kind is nn.LSTM else 3), hidden)


class GivenState(nn.Module):
    """A recurrent layer whose first state the network makes itself, as WaveRNN does."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.embed, self.cell, self.head = nn.Linear(7, 8), nn.GRU(8, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, len(x), self.width, dtype=x.dtype)
        return self.head(self.cell(F.relu(self.embed(x)), state)[0])


def test_recurrent_layer_takes_a_state_of_its_new_width():
    outcome = cut(GivenState().double(), torch.randn(TOKENS).double())
    assert len(outcome.graph.prunable) == 8 + 6
    assert outcome.dead < 1e-12
    cell = outcome.model.cell
    assert cell.hidden_size == outcome.model.width == outcome.model.head.in_features < 6


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_lstm_projection_shrinks_and_its_state_stays(share):
    net = Net(
        lambda m, x: m.head(m.cell(F.relu(m.embed(x)))[0]),
        embed=nn.Linear(7, 8), cell=nn.LSTM(8, 6, proj_size=4, batch_first=True), head=nn.Linear(4, 2),
    )  # fmt: skip
    outcome = cut(net.double(), torch.randn(TOKENS).double(), share=share)
    assert len(outcome.graph.prunable) == 8 + 4
    reasons = {outcome.graph.pinned[unit] for unit in outcome.graph.layers["cell.weight_ih_l0"]}
    assert reasons == {"is the state of an LSTM, which torch requires to be wider than its projection"}
    assert max(outcome.dead, outcome.zeroed) < 1e-12
    assert (
        outcome.model.cell.hidden_size == 6 > outcome.model.cell.proj_size == outcome.model.head.in_features
    )


def test_two_bidirectional_lstm_layers_are_pruned_together():
    cell = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
    net = Net(
        lambda m, x: m.head(m.cell(F.relu(m.embed(x)))[0]),
        embed=nn.Linear(7, 8),
        cell=cell,
        head=nn.Linear(12, 2),
    )
    outcome = cut(net.double(), torch.randn(TOKENS).double())
    assert len(outcome.graph.prunable) == 8 + 6
    assert max(outcome.dead, outcome.zeroed) < 1e-12
