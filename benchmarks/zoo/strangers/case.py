"""A network of the second zoo: how it is built, which inputs it takes, which of its outputs are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Case", "Inputs", "images", "tokens", "whole"]

#: Makes the positional inputs of a forward.
Inputs = Callable[[], tuple[Any, ...]]


def whole(outputs: Any) -> Any:
    """Return all outputs."""
    return outputs


@dataclass(frozen=True)
class Case:
    """One network of the second zoo.

    Args:
        name: ``package/model``.
        package: that must be importable.
        build: makes the network, with random weights.
        inputs: makes random inputs of its forward; the first ones are the example of the trace, others are compared.
        outputs: chooses the outputs that are compared, out of what the network returns.
        prepare: changes the network after it was given random norms, in place.
        reference: changes the dense network of an oracle, in place, where code computes with a number of channels.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    outputs: Callable[[Any], Any] = whole
    prepare: Callable[[nn.Module], object] = whole
    reference: Callable[[nn.Module], object] = whole

    @property
    def is_installed(self) -> bool:
        """Whether the package can be imported."""
        return find_spec(self.package) is not None


def images(*shape: int, batch: int = 1) -> Inputs:
    """Return a maker of one batch of images, shape (batch, *shape)."""
    return lambda: (torch.randn(batch, *shape),)


def tokens(length: int, vocabulary: int = 64, number: int = 1) -> Inputs:
    """Return a maker of ``number`` sequences of tokens, each (1, length)."""
    return lambda: tuple(_tokens(length, vocabulary) for _ in range(number))


def _tokens(length: int, vocabulary: int) -> Tensor:
    # The first numbers are often special: padding, begin, end.
    return torch.randint(3, vocabulary, (1, length))
