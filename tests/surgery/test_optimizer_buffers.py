"""State outside of ``optimizer.state``: cut along where its owner is known, refused or rebuilt elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_prune import prune_, trace
from lightning_prune.surgery.optimizer_buffers import base_optimizers, buffers_of

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))


class ByParameter(SGD):
    """Keeps a slow copy under each parameter."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, lr=0.1)
        self.slow: Any = self.build([p for group in self.param_groups for p in group["params"]])

    def build(self, params: list[Tensor]) -> Any:
        return {p: p.detach().clone() for p in params}

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(self.slow.items())

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        with torch.no_grad():
            for parameter, slow in self.pairs():
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)


class ById(ByParameter):
    def build(self, params: list[Tensor]) -> Any:
        return {id(p): {"slow": p.detach().clone(), "count": torch.zeros(())} for p in params}

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(p, self.slow[id(p)]["slow"]) for group in self.param_groups for p in group["params"]]


class InLists(ByParameter):
    def build(self, params: list[Tensor]) -> Any:
        return [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.param_groups[0]["params"], self.slow[0], strict=True))


class InGroups(ByParameter):
    def build(self, params: list[Tensor]) -> None:
        for group in self.param_groups:
            group["slow"] = tuple(p.detach().clone() for p in group["params"])

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.param_groups[0]["params"], self.param_groups[0]["slow"], strict=True))


class InClosure(ByParameter):
    def build(self, params: list[Tensor]) -> Any:
        copies = {p: p.detach().clone() for p in params}
        return lambda: list(copies.items())

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return self.slow()


class Wrapper(Optimizer):
    """Lookahead as timm writes it: the slow weights are in the state of the optimizer that is wrapped."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        base = SGD(params, lr=0.1, momentum=0.9)
        super().__init__(base.param_groups, {})
        self.inner = {"base": base}
        self.param_groups = base.param_groups

    def step(self, closure: Any = None) -> None:
        base = self.inner["base"]
        base.step(closure)
        with torch.no_grad():
            for parameter in base.param_groups[0]["params"]:
                slow = base.state[parameter].setdefault("slow", parameter.detach().clone())
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def dead(model: nn.Module, units: list[int]) -> None:
    """Set filters of the first layer, and what reads them, to zero: they stay zero in all that follows."""
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[units] = 0
        model[2].weight[:, units] = 0


def trained(kind: Callable[..., Optimizer]) -> tuple[nn.Module, Optimizer]:
    model = network()
    dead(model, [1, 4])
    optimizer = kind(model.parameters())
    train(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("kind", [ByParameter, ById, InLists, InGroups, InClosure, Wrapper])
def test_what_an_optimizer_keeps_elsewhere_is_cut_along(kind: Callable[..., Optimizer]):
    """Filters that are zero from the start make the dense network an exact oracle for the smaller one."""
    (model, optimizer), (oracle, its_optimizer) = trained(kind), trained(kind)
    graph = trace(model, X)
    prune_(model, graph, graph.layers["0.weight"][[1, 4]], [optimizer])
    assert model[0].out_channels == 6
    train(model, optimizer, 3)
    train(oracle, its_optimizer, 3)
    torch.testing.assert_close(model(X), oracle(X))
    torch.testing.assert_close(model[2].weight, oracle[2].weight[:, [0, 2, 3, 5, 6, 7]])


def test_a_cut_that_is_refused_leaves_what_an_optimizer_keeps_elsewhere(monkeypatch):
    from lightning_prune.surgery import prune as surgery

    model = network()
    optimizers = [ByParameter(model.parameters()), Wrapper(model.parameters())]
    train(model, optimizers[1])
    buffers = [tensor for each in optimizers for tensor, _ in buffers_of(each).owned]
    before = [tensor.clone() for tensor in buffers]
    slow = optimizers[1].inner["base"].state[model[0].weight]["slow"]
    monkeypatch.setattr(
        surgery, "prove", lambda *_: (_ for _ in ()).throw(surgery.ProofError("no", graph.prunable))
    )
    graph = trace(model, X)
    with pytest.raises(surgery.SurgeryError):
        prune_(model, graph, graph.prunable[:2], optimizers)
    assert len(buffers) == 6
    assert all(torch.equal(tensor, value) for tensor, value in zip(buffers, before, strict=True))
    assert optimizers[1].inner["base"].state[model[0].weight]["slow"] is slow


def flat(model: nn.Module) -> Any:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


OPAQUE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "all parameters in one vector": (flat, "buffer"),
    "views of one vector": (
        lambda model: {
            p: x.view_as(p)
            for p, x in zip(
                model.parameters(), flat(model).split([p.numel() for p in model.parameters()]), strict=True
            )
        },
        r"buffer\.\.\.|buffer",
    ),
    "by names, where two have one shape": (
        lambda model: {name: p.detach().clone() for name, p in model.named_parameters()},
        r"buffer\.0\.bias",
    ),
    "a history of gradients": (lambda model: torch.zeros(5, *model[0].weight.shape), "buffer"),
    "a copy of the network": (copy.deepcopy, r"buffer\.0\.weight"),
}


@pytest.mark.parametrize(("build", "name"), OPAQUE.values(), ids=OPAQUE)
def test_tensors_that_nobody_can_say_how_to_cut_are_refused_before_anything_changes(build, name):
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.buffer = build(model)
    graph, before = trace(model, X), flat(model)
    with pytest.raises(ValueError, match=f"SGD keeps tensors .*SGD.(?:{name}).*Build the optimizer anew"):
        prune_(model, graph, graph.prunable[:2], [optimizer])
    assert torch.equal(flat(model), before)


def test_settings_hooks_and_the_network_itself_are_no_buffers():
    model = network()
    model.register_buffer("statistics", torch.zeros(8))
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), betas=(0.9, 0.99))
    train(model, optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.model, optimizer.coefficients = model, torch.tensor([0.1, 0.2, 0.3])
    optimizer.register_step_post_hook(lambda *_: model.eval())
    found = buffers_of(optimizer)
    assert (found.owned, found.opaque) == ([], [])
    assert base_optimizers(optimizer) == [optimizer]
