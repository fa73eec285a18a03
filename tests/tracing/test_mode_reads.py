"""Train mode is left out of a trace only where it treats channels as eval mode does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune.graph.trace as tracing
from lightning_prune import SurgeryError, prune_, trace
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.utils.train_modes import mode_is_only_a_flag

IMAGE = torch.zeros(2, 3, 16, 16)


def modes(graph: ChannelGraph) -> tuple[bool, ...]:
    assert graph.evidence is not None
    return graph.evidence.modes


def chain(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *middle, nn.Conv2d(8, 4, 3))


class Custom(nn.Module):
    """Subtracts a constant for each channel, in train mode only."""

    def forward(self, x: Tensor) -> Tensor:
        return x - torch.arange(8.0).view(1, 8, 1, 1) if self.training else x


class ByGetattr(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return x - torch.arange(8.0).view(1, 8, 1, 1) if getattr(self, "training") else x  # noqa: B009


class OfAnother(nn.Module):
    """Reads the mode of a batch norm, whose own forward is known."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(x)
        return out - torch.arange(8.0).view(1, 8, 1, 1) if self.norm.training else out


class Switched(nn.Module):
    """Sets an attribute when the mode changes, and never reads the mode."""

    offset: Tensor | None = None

    def train(self, mode: bool = True) -> Switched:
        self.offset = torch.arange(8.0).view(1, 8, 1, 1) if mode else None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.offset is None else x - self.offset


class AsProperty(nn.Module):
    """Has a mode of its own."""

    mode = False

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.mode

    @training.setter
    def training(self, mode: bool) -> None:
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return x - torch.arange(8.0).view(1, 8, 1, 1) if self.mode else x


class DropsTwice(nn.Module):
    """Passes its mode to a dropout, and reads it once more."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, training=self.training)
        return x - torch.arange(8.0).view(1, 8, 1, 1) if self.training else x


def hooked() -> nn.Sequential:
    net = chain(nn.BatchNorm2d(8))

    def subtract(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out - torch.arange(8.0).view(1, 8, 1, 1) if module.training else out

    net[1].register_forward_hook(subtract)
    return net


@pytest.mark.parametrize(
    "build",
    [
        *(
            lambda kind=kind: chain(kind())
            for kind in (Custom, ByGetattr, OfAnother, Switched, AsProperty, DropsTwice)
        ),
        hooked,
    ],
    ids=["custom", "getattr", "another's", "train()", "property", "twice", "hook"],
)
def test_what_differs_in_train_mode_is_traced_in_both(build):
    graph = trace(build().eval(), IMAGE)
    assert modes(graph) == (False, True)
    assert not len(graph.prunable)  # the constant of eight channels pins them, and only train mode shows it


def test_networks_that_differ_in_known_operators_only_are_traced_in_eval_mode_with_the_same_graph(
    monkeypatch,
):
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, p=0.5, training=self.training)

    layers = [nn.BatchNorm2d(8), nn.Dropout(0.2), nn.ReLU(), nn.Dropout2d(), nn.AlphaDropout(), Drops()]
    net = chain(*layers, nn.FeatureAlphaDropout(), nn.BatchNorm2d(8, track_running_stats=False)).train()
    graph = trace(net, IMAGE)
    assert modes(graph) == (False,)
    monkeypatch.setattr(tracing, "MODES", (True, False))  # begins with train mode, so that both are traced
    both = trace(net, IMAGE)
    assert modes(both) == (True, False)
    assert (graph.num_units, graph.pinned, graph.cost("macs")) == (
        both.num_units,
        both.pinned,
        both.cost("macs"),
    )
    assert {n: {d: u.tolist() for d, u in dims.items()} for n, dims in graph.bindings.items()} == {
        n: {d: u.tolist() for d, u in dims.items()} for n, dims in both.bindings.items()
    }
    assert len(graph.prunable) == 8
    prune_(net, graph, [0, 3])
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 4, 12, 12)


@pytest.mark.parametrize("drops_always", [False, True])
def test_attention_that_drops_in_train_mode_is_traced_once(drops_always: bool):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.qkv, self.drop = 4, nn.Linear(16, 48), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.training else 0.0)
            return out.transpose(1, 2).flatten(2)

    class OnlyInTraining(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop.p if self.training else 0.5)
            return out.transpose(1, 2).flatten(2)

    net = nn.Sequential(OnlyInTraining() if drops_always else Attention(), nn.Linear(16, 2))
    assert modes(trace(net, torch.zeros(2, 5, 16))) == ((False, True) if drops_always else (False,))


def test_a_batch_norm_without_momentum_and_a_network_with_auxiliary_heads_are_traced_in_both_modes():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.aux = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.body(x)
            return [self.head(x), self.aux(x)] if self.training else [self.head(x)]

    assert modes(trace(chain(nn.BatchNorm2d(8, momentum=None)), IMAGE)) == (False, True)
    graph = trace(Auxiliary(), IMAGE)
    assert modes(graph) == (False, True)
    assert sorted(graph.bindings["aux.weight"]) == [0, 1]


def test_the_mode_is_an_ordinary_attribute_after_a_trace():
    net = chain(nn.Dropout()).train()
    net[1].eval()
    trace(net, IMAGE)
    assert [module.training for module in net.modules()] == [True, True, False, True]
    assert "training" not in vars(nn.Module)
    assert "training" in vars(net)
    assert mode_is_only_a_flag(net)


def test_a_smaller_network_that_asks_for_its_mode_is_refused():
    class AsksIfNarrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1 if x.shape[1] == 8 or not self.training else x + 0

    net = chain(AsksIfNarrow())
    graph = trace(net, IMAGE)
    assert modes(graph) == (False,)
    with pytest.raises(SurgeryError, match="may do something else in train mode"):
        prune_(net, graph, [0])
    assert net[0].weight.shape == (8, 3, 3, 3)
