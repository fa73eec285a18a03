"""Tests of cut_state_: after a cut, optimizers step as if the smaller network had been trained from the start."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_prune import PruningRecord, SurgeryError, prune_, trace
from lightning_prune.surgery.optimizer_state import CutParameter, cut_state_
from lightning_prune.utils.modules import cut
from tests.support.nets import Small, random_units

X = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 0, 1])

# All optimizers of torch whose step is elementwise: for them a masked dense network is an exact oracle.
ELEMENTWISE: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(optim.SGD, lr=0.05),
    "SGD momentum": partial(optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "SGD nesterov": partial(optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "SGD fused": partial(optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "Adam": partial(optim.Adam, lr=0.01),
    "Adam amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True),
    "Adam foreach": partial(optim.Adam, lr=0.01, foreach=True),
    "Adam fused": partial(optim.Adam, lr=0.01, fused=True),
    "AdamW": partial(optim.AdamW, lr=0.01),
    "AdamW amsgrad fused": partial(optim.AdamW, lr=0.01, amsgrad=True, fused=True),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "NAdam foreach": partial(optim.NAdam, lr=0.01, foreach=True),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "RMSprop": partial(optim.RMSprop, lr=0.01),
    "RMSprop centered momentum": partial(optim.RMSprop, lr=0.01, centered=True, momentum=0.9),
    "RMSprop foreach": partial(optim.RMSprop, lr=0.01, foreach=True),
    "Adagrad": partial(optim.Adagrad, lr=0.01, lr_decay=0.01),
    "Adagrad fused": partial(optim.Adagrad, lr=0.01, fused=True),
    "Adadelta": partial(optim.Adadelta, lr=1.0),
    "Adadelta foreach": partial(optim.Adadelta, lr=1.0, foreach=True),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "ASGD": partial(optim.ASGD, lr=0.01),
    "Rprop": partial(optim.Rprop, lr=0.01),
}
ADAFACTOR = {
    "Adafactor": partial(optim.Adafactor, lr=0.05),
    "Adafactor foreach": partial(optim.Adafactor, lr=0.05, foreach=True),
}


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def step(model: nn.Module, *optimizers: Optimizer) -> float:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def warmed_up(make: Callable[..., Optimizer]) -> tuple[nn.Module, Optimizer]:
    """A network after a few steps, so that there is state worth keeping.

    In eval mode: in train mode the bias before a batch norm has rounding errors for a gradient, which Rprop and
    Adagrad turn into steps.
    """
    model = Small().double().eval()
    optimizer = make(model.parameters())
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def twins(
    model: nn.Module, optimizer: Optimizer, make: Callable[..., Optimizer]
) -> tuple[nn.Module, Optimizer]:
    """Copies that share nothing with the originals."""
    other = copy.deepcopy(model)
    copied = make(other.parameters())
    copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, copied


def cut_half(model: nn.Module, *optimizers: Optimizer) -> PruningRecord:
    graph = trace(model, X)
    return prune_(model, graph, random_units(graph), optimizers)


@torch.no_grad()
def mask_(model: nn.Module, record: PruningRecord) -> None:
    """Set everything that the record removes to zero."""
    for name, parameter in model.named_parameters():
        for dim, kept in record.kept.get(name, {}).items():
            removed = np.setdiff1d(np.arange(parameter.shape[dim]), kept)
            parameter.index_fill_(dim, torch.from_numpy(removed), 0)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_steps_after_a_cut_equal_those_of_a_masked_dense_network(name):
    make = ELEMENTWISE[name]
    small, carried = warmed_up(make)
    dense, masked = twins(small, carried, make)
    record = cut_half(small, carried)
    assert record
    for _ in range(3):
        mask_(dense, record)
        assert step(small, carried) == pytest.approx(step(dense, masked), rel=1e-9)
    for (name, parameter), whole in zip(small.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(parameter, cut(whole, record.kept.get(name, {})), rtol=1e-8, atol=1e-10)


def hand_sliced(state: dict[str, Tensor], shape: torch.Size, dims: dict[int, list[int]]) -> dict[str, Tensor]:
    """Adafactor's state by NumPy: a factor has size 1 where it is a mean."""
    sliced = {}
    for key, value in state.items():
        array = value.numpy()
        for dim, kept in dims.items():
            mean = {"row_var": len(shape) - 1, "col_var": len(shape) - 2}.get(key)
            if key != "step" and dim != mean:
                array = np.take(array, kept, axis=dim)
        sliced[key] = torch.from_numpy(np.array(array))
    return sliced


@pytest.mark.parametrize("name", ADAFACTOR)
def test_adafactor_steps_as_on_the_smaller_network_with_state_sliced_by_hand(name):
    make = ADAFACTOR[name]
    small, carried = warmed_up(make)
    dense, whole = twins(small, carried, make)
    record = cut_half(small, carried)
    by_hand = record.apply_(Small().double().eval())
    by_hand.load_state_dict(small.state_dict())
    fresh = make(by_hand.parameters())
    for (name, old), new in zip(dense.named_parameters(), by_hand.parameters(), strict=True):
        fresh.state[new] = hand_sliced(whole.state[old], old.shape, record.kept.get(name, {}))
    for _ in range(3):
        assert step(small, carried) == step(by_hand, fresh)
    for (name, a), b in zip(small.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert {key: value.shape for key, value in carried.state[a].items()} == {
            key: value.shape for key, value in fresh.state[b].items()
        }


def test_adafactor_keeps_the_right_row_of_a_square_weight():
    """The factors of a square weight have shapes that only differ in which dimension is 1."""
    weight = nn.Parameter(torch.arange(9.0).reshape(3, 3))
    optimizer = optim.Adafactor([weight])
    optimizer.state[weight] = {
        "step": torch.tensor(1.0),
        "row_var": torch.tensor([[1.0], [2.0], [3.0]]),
        "col_var": torch.tensor([[4.0, 5.0, 6.0]]),
    }
    before, weight.data = weight.shape, weight.data[[0, 2]]
    cut_state_(optimizer, {"weight": CutParameter(weight, before, {0: [0, 2]})})
    assert optimizer.state[weight]["row_var"].tolist() == [[1.0], [3.0]]
    assert optimizer.state[weight]["col_var"].tolist() == [[4.0, 5.0, 6.0]]


def closure_step(model: nn.Module, optimizer: Optimizer) -> float:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return optimizer.step(closure).item()


def test_lbfgs_is_reset_with_a_warning():
    model = Small().double().eval()
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    closure_step(model, optimizer)
    with pytest.warns(UserWarning, match="LBFGS state is reset: its history of all parameters"):
        cut_half(model, optimizer)
    other = copy.deepcopy(model)
    fresh = optim.LBFGS(other.parameters(), lr=0.1, max_iter=3)
    for _ in range(2):
        assert closure_step(model, optimizer) == closure_step(other, fresh)


def test_lbfgs_of_other_parameters_keeps_its_history():
    model, apart = Small().double(), nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optim.LBFGS([apart])

    def closure() -> Tensor:
        apart.grad = apart.detach().clone()
        return apart.square().sum().detach()

    optimizer.step(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut_half(model, optimizer)
    assert optimizer.state[apart]["n_iter"] > 0


class Preconditioned(optim.SGD):
    """Keeps a square matrix per weight, as Shampoo does, and a list of tensors, as SOAP does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "left" not in state:
                    state["left"] = torch.eye(len(parameter), dtype=parameter.dtype)
                    state["sides"] = [torch.eye(size) for size in parameter.shape]
                state["left"] @ parameter.flatten(1)
        return super().step(closure)


def test_a_square_preconditioner_of_a_square_weight_is_not_cut_like_momentum():
    square, oblong = nn.Linear(6, 6, bias=False).double(), nn.Linear(6, 2, bias=False).double()
    net = nn.Sequential(nn.Linear(192, 6).double(), square, oblong)
    weights = [layer.weight for layer in net]
    optimizer = Preconditioned(weights, lr=0.01, momentum=0.9)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    graph = trace(net, X.flatten(1))
    with pytest.warns(
        UserWarning, match="'0.weight', '1.weight', '2.weight' is reset: left, sides cannot be cut"
    ):
        prune_(net, graph, [*graph.layers["0.weight"][:2], *graph.layers["1.weight"][:3]], [optimizer])
    assert not optimizer.state
    net(X.flatten(1)).sum().backward()
    optimizer.step()
    assert optimizer.state[square.weight]["momentum_buffer"].shape == (3, 4)


def test_groups_keep_their_order_and_options_and_foreign_parameters_their_state():
    model, apart = Small().double(), nn.Parameter(torch.ones(5, dtype=torch.float64))
    named = dict(model.named_parameters())
    biases = [p for name, p in named.items() if name.endswith("bias")]
    weights = [p for name, p in named.items() if name.endswith("weight") and not name.startswith("stem")]
    first = optim.AdamW(
        [{"params": biases, "weight_decay": 0.0, "name": "biases"}, {"params": weights, "betas": (0.8, 0.9)}],
        lr=0.01,
    )
    second = optim.SGD([apart], lr=0.1, momentum=0.9)
    schedule = optim.lr_scheduler.OneCycleLR(first, [0.1, 0.2], total_steps=20)
    apart.grad = torch.ones_like(apart)
    step(model, first)
    second.step()
    groups = [{key: value for key, value in g.items() if key != "params"} for g in first.param_groups]
    members = [[id(p) for p in g["params"]] for g in first.param_groups]
    cut_half(model, first, second)  # the stem's weight is in no optimizer
    assert [{key: value for key, value in g.items() if key != "params"} for g in first.param_groups] == groups
    assert [[id(p) for p in g["params"]] for g in first.param_groups] == members
    assert second.state[apart]["momentum_buffer"].tolist() == [1.0] * 5
    rates = first.param_groups[0]["lr"], first.param_groups[1]["lr"]
    stem = model.stem.weight.detach().clone()
    step(model, first)
    schedule.step()
    assert (first.param_groups[0]["lr"], first.param_groups[1]["lr"]) != rates
    assert torch.equal(stem, model.stem.weight)
    assert stem.shape[0] < 8
    assert all(value.shape in (p.shape, ()) for p, s in first.state.items() for value in s.values())


@pytest.mark.filterwarnings("ignore:LBFGS state is reset:UserWarning")
@pytest.mark.parametrize("name", ["AdamW", "LBFGS"])
def test_a_rolled_back_cut_does_not_change_any_optimizer(name, monkeypatch):
    model = Small().double()
    optimizer = getattr(optim, name)(model.parameters(), lr=0.01)
    closure_step(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    expected, other = twins(model, optimizer, partial(getattr(optim, name), lr=0.01))
    graph = trace(model, X)

    def refuse(*args: Any) -> None:
        from lightning_prune.surgery.proof import ProofError

        raise ProofError("no", np.empty(0, np.int64))

    monkeypatch.setattr("lightning_prune.surgery.prune.prove", refuse)
    with pytest.raises(SurgeryError, match="rolled back"):
        prune_(model, graph, random_units(graph), [optimizer])
    loss = loss_of(model)  # as in training, where the last loss still exists
    with pytest.raises(SurgeryError, match="rolled back"):
        prune_(model, graph, random_units(graph), [optimizer])
    assert loss.isfinite()
    after = optimizer.state_dict()["state"]
    assert after.keys() == before["state"].keys()
    assert closure_step(model, optimizer) == closure_step(expected, other)
