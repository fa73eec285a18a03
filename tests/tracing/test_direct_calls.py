"""A recording is the same whether common calls go through torch's dispatcher or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.tracing import modes
from lightning_prune.tracing.calls import Recording
from lightning_prune.tracing.direct_calls import DIRECT
from lightning_prune.tracing.recorder import record_forward

IMAGE = torch.zeros(2, 3, 33, 40)


class Calls(nn.Module):
    """Passes all kinds of arguments: by position, by name, as numbers, strings and tensors of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8, 3, 3, 3)), nn.Parameter(torch.ones(8))
        self.norm, self.plain = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.batch, self.steps = nn.BatchNorm2d(8, track_running_stats=False), 2
        self.layer, self.group = nn.LayerNorm([8, 16, 19]), nn.Conv2d(8, 8, 1, groups=4)
        self.groups = nn.GroupNorm(2, 8)
        self.register_buffer("scale", torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Any:
        y = F.conv2d(x, self.weight, self.bias, self.steps)
        y = y + torch.conv2d(input=x, weight=self.weight, stride=self.steps)
        y = y + F.conv2d(x, self.weight, None, (2, 2), "valid") + F.conv2d(x, self.weight, None, [2], 0)
        y = self.batch(self.plain(self.norm(y))) * self.scale
        y = self.layer(self.group(y)) + F.layer_norm(y, (8, 16, 19))
        y = self.groups(y) + F.group_norm(y, 8) + F.group_norm(y.transpose(2, 3), 4, eps=1).transpose(2, 3)
        y = (
            F.gelu(y)
            + F.gelu(y, approximate="tanh")
            + F.relu6(y)
            + F.hardtanh(y, -1, 1)
            + F.hardtanh(y, -1.0, 1.0)
            + F.silu(y)
        )
        y = torch.add(y, y, alpha=2) + y.add(1) + y.mul(y.transpose(2, 3).transpose(2, 3)) + y.sigmoid()
        y += F.hardswish(y, inplace=True) + F.hardsigmoid(y) + y.tanh() + F.relu_(y.clone())
        y.add_(y.mean((2, 3), keepdim=True)).add_(torch.tanh(y)).relu_()
        y = torch.mul(F.hardswish(y), torch.sigmoid(y)) * F.hardsigmoid(y, inplace=True) + F.silu(
            y, inplace=True
        )
        y = torch.add(F.hardtanh(y, 0.0, 6.0, inplace=True), F.relu6(y, inplace=True)).relu() * torch.relu(y)
        half = y.half() + y.bfloat16() + torch.relu(y.double()).to(y.dtype) + y.to(torch.int64).relu()
        with torch.autocast("cpu"):
            half = half + F.conv2d(x, self.weight)[:, :, ::2, ::2][..., :16, :19]
        return (
            F.adaptive_avg_pool2d(half, 1),
            F.adaptive_avg_pool2d(y, (None, 1)),
            F.adaptive_avg_pool2d(y[0], 1),
        )


class Watched(nn.Module):
    """Has a mode of its own, which must see its operators."""

    def forward(self, x: Tensor) -> Tensor:
        seen = []

        class See(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(func)
                return func(*args, **(kwargs or {}))

        with See():
            y = torch.relu(x)
        assert seen == [torch.ops.aten.relu.default]
        return torch.vmap(torch.relu)(y)


NETWORKS = {
    "calls": lambda: Calls(),
    "watched": lambda: Watched(),
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(),
    "googlenet": lambda: torchvision.models.googlenet(init_weights=False, aux_logits=False),
    "swin": lambda: torchvision.models.swin_t(),
    "densenet": lambda: torchvision.models.densenet121(),
}


def described(recording: Recording) -> list[Any]:
    """Return all that a recording holds, with tensors numbered in the order in which they appear."""
    numbers: dict[int, int] = {}

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            number = numbers.setdefault(id(value), len(numbers))
            return (number, value.shape, value.stride(), value.dtype, value.device.type)
        if isinstance(value, (list, tuple)):
            return [of(item) for item in value]
        return (type(value), value)

    return [
        (str(call.op), of(call.args), of(list(call.kwargs.values())), of(call.out), call.module, call.place)
        for call in recording.calls
        if call.place[2] != "batch_norm" or "empty" not in str(call.op)  # the unused reserve of batch norms
    ]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_recordings_are_those_of_the_dispatcher(name: str, training: bool, monkeypatch: pytest.MonkeyPatch):
    net = NETWORKS[name]()
    direct = record_forward(net, (IMAGE,), {}, training)
    monkeypatch.setattr(modes, "DIRECT", {})
    assert described(direct) == described(record_forward(net, (IMAGE,), {}, training))


def test_every_direct_call_is_made(monkeypatch: pytest.MonkeyPatch):
    made = set()

    def watched(function: Any, handler: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            covered = handler(*args, **kwargs)
            made.add(function if covered is not None and args[0].is_meta else None)
            return covered

        return call

    monkeypatch.setattr(modes, "DIRECT", {each: watched(each, handler) for each, handler in DIRECT.items()})
    record_forward(Calls(), (IMAGE,), {}, False)
    assert {function.__qualname__ for function in DIRECT.keys() - made} == set()
