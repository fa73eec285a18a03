"""Code that reads numbers of channels where the proof without a forward does not see it is run again."""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_prune import SurgeryError, prune_, trace
from tests.support import hidden_reads


@pytest.fixture(autouse=True)
def _any_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let networks of these tests be proven without a forward as those of known packages are."""
    monkeypatch.setattr("lightning_prune.surgery.proof.is_known_code", lambda model: True)


class Calls(nn.Module):
    """Calls a function between two convolutions."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], first: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last, self.function = first or nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), function
        self.norm, self.four = nn.BatchNorm2d(8), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self, self.norm(self.first(x))))


def assert_refused(net: nn.Module) -> None:
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    with pytest.raises(SurgeryError):
        prune_(net, graph, graph.prunable[:4])


def after_view(net: Any, x: Tensor) -> Tensor:
    try:
        x.view(1, 4, 36)
    except RuntimeError:
        return x
    return x.relu()


def after_sum(net: Any, x: Tensor) -> Tensor:
    try:
        return x + net.four
    except RuntimeError:
        return 2 * x


def of_local_variables(net: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.relu() if locals()["c"] < 8 else x


def in_thread(net: Any, x: Tensor) -> Tensor:
    sizes: list[int] = []
    thread = threading.Thread(target=lambda: sizes.append(x.shape[1]))
    thread.start()
    thread.join()
    return x.relu() if sizes[0] < 8 else x


def in_pool(net: Any, x: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return x.relu() if pool.submit(lambda: x.shape[1]).result() < 8 else x


class Own(Tensor):
    """Takes another way when it has few channels."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            small = func is torch.relu and args[0].shape[1] < 8
            return args[0].tanh() if small else func(*args, **(kwargs or {}))


class Static(nn.Conv2d):
    """Has an attribute of its class in the place of that of the module."""

    out_channels = 0


READERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "failed view": after_view,
    "failed sum": after_sum,
    "local variables": of_local_variables,
    "thread": in_thread,
    "pool": in_pool,
    "map of sizes": lambda net, x: x.relu() if sorted(map(Tensor.size, [x]))[0][1] < 8 else x,
    "map of shapes": lambda net, x: (
        x.relu() if sorted(map(operator.attrgetter("shape"), [x]))[0][1] < 8 else x
    ),
    "text of a norm": lambda net, x: x if repr(net.norm).startswith("BatchNorm2d(8") else x.relu(),
    "text of a convolution": lambda net, x: x if str(net.first).startswith("Conv2d(3, 8") else x.relu(),
    "deep copy": lambda net, x: x if copy.deepcopy(net.first).out_channels == 8 else x.relu(),
    "copy": lambda net, x: x if copy.copy(net.first).out_channels == 8 else x.relu(),
    "own tensors": lambda net, x: torch.relu(x.as_subclass(Own)).as_subclass(Tensor),
    "scripted branch": hidden_reads.scripted,
    "scripted number": lambda net, x: x if hidden_reads.has_eight(x) else x.relu(),
    "dictionary": lambda net, x: x.relu() if hidden_reads.is_small(net, x) else x,
    "decorated": lambda net, x: x.relu() if hidden_reads.is_small_decorated(net, x) else x,
}


@pytest.mark.parametrize("reader", READERS)
def test_code_that_reads_unseen_is_run_again(reader: str):
    assert_refused(Calls(READERS[reader]))


def test_an_attribute_of_a_class_is_no_cover():
    assert_refused(Calls(lambda net, x: x if net.first.out_channels == 8 else x.relu(), Static(3, 8, 3)))


UNSEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "parameter": lambda net, x: nn.Parameter(x.relu(), requires_grad=False),
    "subclass": lambda net, x: torch.Tensor._make_subclass(Tensor, x),
    "thread": lambda net, x: _from_thread(x.relu),
}


def _from_thread(function: Callable[[], Tensor]) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(function() * 2))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("way", UNSEEN)
def test_tensors_that_no_operator_has_made_are_followed_by_a_run(way: str):
    assert_refused(Calls(UNSEEN[way]))


def test_operators_in_python_are_run_again():
    library = torch.library.Library("lightning_prune_test", "DEF")
    library.define("few(Tensor x) -> Tensor")
    library.impl("few", lambda x: x.relu() if x.shape[1] < 8 else x.detach(), "CompositeImplicitAutograd")
    assert_refused(Calls(lambda net, x: torch.ops.lightning_prune_test.few(x)))
