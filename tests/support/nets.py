"""Small networks, and helpers that the tests of tracing and surgery share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import ChannelGraph, PruningRecord, prune_, trace
from lightning_prune.testing import error, randomise_, with_dead_filters, with_zeroed_consumers


class Net(nn.Module):
    """A network made of ``parts`` (modules, parameters, numbers), whose forward is ``run(self, *inputs)``."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class Small(nn.Module):
    """A residual sum, a concatenation, a depthwise convolution, norms and a linear classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 6, 3, padding=1)
        self.back = nn.Conv2d(6, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mix = nn.Conv2d(2 * width, 10, 1)
        self.mix_norm = nn.BatchNorm2d(10)
        self.hidden = nn.Linear(40, 7)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.back(F.relu(self.inner(x)))
        x = F.relu(self.mix_norm(self.mix(torch.cat([x, self.depthwise(x)], 1))))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(F.relu(self.hidden(x)))


class Attention(nn.Module):
    """Attention written with matrix products, with its sizes in attributes."""

    def __init__(self, dim: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        weights = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


@dataclass
class Outcome:
    """A cut network, and its relative errors against both oracles.

    Attributes:
        dense: the network before the cut.
        model: the network after it.
        graph: of the dense network.
        remove: the units that were removed.
        record: of the cut.
        dead: error against the dense network with the removed filters set to zero.
        zeroed: error against the dense network with the weights that read the removed filters set to zero.
    """

    dense: nn.Module
    model: nn.Module
    graph: ChannelGraph
    remove: np.ndarray
    record: PruningRecord
    dead: float
    zeroed: float


def independent_units(graph: ChannelGraph) -> np.ndarray:
    """Return the prunable units whose removal does not change the values of other channels."""
    return graph.prunable[~np.isin(graph.prunable, graph.statistics_units)]


def random_units(
    graph: ChannelGraph, seed: int = 0, share: float = 0.5, among: np.ndarray | None = None
) -> np.ndarray:
    """Choose a random share of the units (``among`` these, if given); at least one remains in every dimension."""
    among = independent_units(graph) if among is None else among
    remove = np.random.default_rng(seed).permutation(among)[: max(1, round(len(among) * share))]
    for dims in graph.bindings.values():
        for units in dims.values():
            if not graph.kept(remove)[units].any():
                remove = remove[remove != units[0]]
    return remove


def cut(model: nn.Module, *inputs: Tensor, seed: int = 0, share: float = 0.5) -> Outcome:
    """Randomise a copy of ``model``, trace it, remove random units, and compare it with both oracles."""
    dense = randomise_(copy.deepcopy(model)).eval()
    small = copy.deepcopy(dense)
    graph = trace(small, *inputs)
    remove = random_units(graph, seed, share)
    dead, zeroed = with_dead_filters(dense, graph, remove), with_zeroed_consumers(dense, graph, remove)
    record = prune_(small, graph, remove)
    return Outcome(
        dense, small, graph, remove, record, error(dead, small, *inputs), error(zeroed, small, *inputs)
    )


def parameters(model: nn.Module) -> int:
    """Return the number of parameters; shared ones are counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def counted_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Count the multiply-accumulates of one eval forward with torch's counter of FLOPs (two per MAC)."""
    counter = FlopCounterMode(display=False)
    with counter:
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


def state(model: nn.Module) -> dict[str, Any]:
    """Return all that an operation without side effects must not change, also modes, hooks and random state."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "grads": {name: None if t.grad is None else t.grad.clone() for name, t in tensors.items()},
        "needs": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {
            name: {key: (type(value), value) for key, value in vars(module).items() if _is_plain(value)}
            for name, module in model.named_modules()
        },
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        "random": torch.get_rng_state(),
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, tuple, list))


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """Assert that nested dictionaries and lists of tensors and plain values are equal, bit by bit."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), where
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is type(expected), where
        assert len(actual) == len(expected), where
        for index, items in enumerate(zip(actual, expected, strict=True)):
            assert_same(*items, f"{where}[{index}]")
    else:
        assert actual == expected, where
