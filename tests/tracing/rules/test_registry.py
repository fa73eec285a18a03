"""Operators without a rule."""

from __future__ import annotations

import pytest
import torch

from tests.support.rule_cases import check_pin_reason


@torch.library.custom_op("tests::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    """Return a copy; nothing is known of this operator."""
    return x.clone()


@opaque.register_fake
def _(x):
    return torch.empty_like(x)


PINNED = {"an operator of one's own": (opaque, r"without a rule \(tests::opaque")}


@pytest.mark.parametrize("name", PINNED)
def test_pin_reason_names_the_operator(name):
    check_pin_reason(*PINNED[name])
