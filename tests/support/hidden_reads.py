"""A network whose code looks into the dictionaries of its modules, where no property sees it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Network(nn.Sequential):
    """Holds another network."""


def is_small(net: Any, x: Tensor) -> bool:
    """Return whether a layer has lost filters."""
    return int(vars(net.first)["out_channels"]) < 8
