"""A network whose code looks into the dictionaries of its modules, where no property sees it."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn


class Network(nn.Sequential):
    """Holds another network."""


def is_small(net: Any, x: Tensor) -> bool:
    """Return whether a layer has lost filters."""
    return int(vars(net.first)["out_channels"]) < 8


@torch.no_grad()
def is_small_decorated(net: Any, x: Tensor) -> bool:
    """Return the same, behind a decorator."""
    return is_small(net, x)


def _has_eight(x: Tensor) -> bool:
    return x.size(1) == 8


def _relu_if_small(x: Tensor) -> Tensor:
    return x.relu() if x.size(1) < 8 else x


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # many networks have scripted functions all the same
    #: whether a tensor has eight channels
    has_eight = torch.jit.script(_has_eight)
    _scripted = torch.jit.script(_relu_if_small)


def scripted(net: Any, x: Tensor) -> Tensor:
    """Return a tensor, or what is positive of it where it has few channels."""
    return cast(Tensor, _scripted(x))
