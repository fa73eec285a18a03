"""Running statistics of batch norms, estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from lightning_prune.utils.distributed import average_
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.modules import training_modes


def tracked_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch norms that keep running statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


def scale_and_shift(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor and the constant, per channel, that a batch norm applies in eval mode.

    Example:
        >>> scale, shift = scale_and_shift(nn.BatchNorm1d(2, eps=0))
        >>> scale.tolist(), shift.tolist()
        ([1.0, 1.0], [0.0, 0.0])
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()


def recalibrate_(model: nn.Module, examples: Iterable[Example]) -> int:
    """Estimate the running statistics of batch norms anew, as plain averages over ``examples``.

    A cut changes the activations of later layers, but not the running statistics, which then no longer fit. During
    the estimate all modules but the batch norms are in eval mode. Without batch norms or examples, nothing happens.

    Returns:
        The number of examples used.

    Example:
        >>> norm = nn.Sequential(nn.BatchNorm1d(1))
        >>> recalibrate_(norm, [((torch.tensor([[1.0], [5.0]]),), {})]), norm[0].running_mean.item()
        (1, 3.0)
    """
    return recalibrate_by_(
        model, (partial(model, *args, **kwargs) for args, kwargs in examples), tracked_norms(model)
    )


def recalibrate_by_(
    model: nn.Module,
    forwards: Iterable[Callable[[], Any]],
    norms: Sequence[nn.modules.batchnorm._BatchNorm],
) -> int:
    """Estimate the running statistics of ``norms`` anew, each of ``forwards`` being a call that runs ``model`` once.

    Returns:
        The number of calls made.
    """
    stream = iter(forwards)
    first = next(stream, None) if norms else None
    if first is None:
        return 0
    number = 0
    with _averaging(norms), torch.no_grad(), training_modes(model, lambda module: module in norms):
        for forward in chain([first], stream):
            forward()
            number += 1
    return number


def average_norms_(model: nn.Module, weight: float) -> None:
    """Replace running statistics by their means over the processes of a distributed run, each with its ``weight``."""
    for norm in tracked_norms(model):
        for buffer in (norm.get_buffer("running_mean"), norm.get_buffer("running_var")):
            average_(buffer, weight)


@contextmanager
def _averaging(norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Let norms average over the batches of this block; if it raises, their statistics are those from before."""
    before = [(norm.momentum, {name: b.clone() for name, b in norm.named_buffers()}) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # None makes torch keep a cumulative average
        yield
    except BaseException:
        for norm, (_, buffers) in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
        raise
    finally:
        for norm, (momentum, _) in zip(norms, before, strict=True):
            norm.momentum = momentum
