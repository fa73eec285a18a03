"""Networks with residual branches of many kinds, and the oracle for blocks that vanish."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import prune_, trace
from lightning_prune.criteria.branch_watch import watched_branches
from lightning_prune.graph.block_search import blocks_of
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.tracing.calls import tensors_in
from lightning_prune.utils.example_inputs import as_example
from lightning_prune.utils.modules import training_modes

__all__ = ["KINDS", "Stack", "largest_difference", "make_deterministic_"]


class Basic(nn.Module):
    """ResNet: addition in the memory of the branch, one ReLU for both places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Preactivated(nn.Module):
    """Begins with an activation that works in place, so that the stream is its result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(width, 6, 1), nn.SiLU(), nn.Conv2d(6, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return x + self.body(x)


class Scaled(nn.Module):
    """ConvNeXt: a scale that is a parameter of the block itself, and the branch in another order of dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 9), nn.Linear(9, width)
        self.gamma = nn.Parameter(torch.rand(width))
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + self.drop(y.permute(0, 3, 1, 2))


class Attention(nn.Module):
    """Transformer layer with two branches, one with a scale in the forward and the other with a norm behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.rand(width))
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y = self.norm1(tokens)
        tokens = tokens + self.scale * self.attn(y, y, y, need_weights=False)[0]
        tokens = tokens + self.norm2(self.mlp(tokens))
        return tokens.transpose(1, 2).reshape(x.shape)


class Parallel(nn.Module):
    """Attention to channels and a convolution, side by side on one input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + x * self.gate(x) + self.conv(x)


class Prelu(nn.Module):
    """An activation with parameters behind the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, width, 1))
        self.act = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(torch.add(x, self.branch(x), alpha=0.5))


class Difference(nn.Module):
    """Subtracts what its branch finds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.noise = nn.Sequential(nn.Conv2d(width, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.noise(x)


KINDS: Sequence[Callable[[int], nn.Module]] = (
    Basic, Preactivated, Scaled, Attention, Parallel, Prelu, Difference,
)  # fmt: skip


class Stack(nn.Module):
    """Blocks one after the other, with the features of each of them among the outputs."""

    def __init__(
        self, kinds: Sequence[Callable[[int], nn.Module]], width: int = 8, taps: bool = False
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(kind(width) for kind in kinds)
        self.head = nn.Conv2d(width, 2, 1)
        self.taps = taps

    def forward(self, image: Tensor) -> Any:
        x = self.stem(image)
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return (self.head(x), *features) if self.taps else self.head(x)


def largest_difference(
    net: nn.Module, example: Any, names: Sequence[str], remove: Sequence[int] = (), seed: int | None = None
) -> tuple[float, PruningRecord]:
    """Let blocks vanish from ``net``, and compare it with a copy in which their branches are multiplied by zero.

    Outputs, gradients of all remaining parameters and buffers are compared, in eval and train mode.

    Args:
        net: the network, which is cut.
        example: its input.
        names: of the blocks.
        remove: units that go, too.
        seed: of the random numbers of each forward; None: random layers such as dropout are taken out, since a branch
            that has vanished draws no random numbers.

    Returns:
        The largest relative difference, and the record.
    """
    args, kwargs = as_example(example)
    if seed is None:
        make_deterministic_(net)
    dense = copy.deepcopy(net)
    blocks = blocks_of(trace(dense, *args, **kwargs))
    record = prune_(net, trace(net, *args, **kwargs), remove, blocks=names)
    worst = 0.0
    for training in (False, True):
        for model in (net, dense):
            model.zero_grad()
        with training_modes(net, lambda _: training), training_modes(dense, lambda _: training):  # noqa: B023
            torch.manual_seed(seed or 0)
            small = tensors_in(net(*args, **kwargs))
            torch.manual_seed(seed or 0)
            with watched_branches(blocks, names, lambda name, stream, branch: branch * 0):
                expected = tensors_in(dense(*args, **kwargs))
        for each in (small, expected):
            loss = sum(tensor.float().square().mean() for tensor in each if tensor.requires_grad)
            if isinstance(loss, Tensor):
                loss.backward()
        worst = max(worst, _worst(net, dense, list(zip(small, expected, strict=True))))
    return worst, record


def _worst(net: nn.Module, dense: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> float:
    gradients = {name: p.grad for name, p in dense.named_parameters()}
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            expected = gradients[name]
            pairs.append((parameter.grad, torch.zeros_like(parameter) if expected is None else expected))
        elif parameter.requires_grad and gradients[name] is not None:  # it must have no effect
            pairs.append((torch.zeros_like(parameter), gradients[name]))  # type: ignore[arg-type]
    buffers = dict(dense.named_buffers())
    pairs += [(buffer, buffers[name]) for name, buffer in net.named_buffers()]
    differences = [0.0]
    for left, right in pairs:
        one, other = left.detach().double(), right.detach().double()
        if one.numel():
            differences.append(float((one - other).norm() / other.norm().clamp_min(1e-6)))
    return max(differences)


def make_deterministic_(net: nn.Module) -> None:
    """Set all probabilities of dropping something to zero."""
    for module in net.modules():
        for name in ("p", "drop_prob", "dropout", "attention_dropout", "hidden_dropout", "attn_drop_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
