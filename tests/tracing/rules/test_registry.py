"""Operators without a rule."""

from __future__ import annotations

import pytest
import torch

from tests.support.rule_cases import check_pin_reason

PINNED = {
    "a Fourier transform": (lambda x: torch.fft.rfft2(x).abs(), r"without a rule \(aten::_fft_r2c"),
}


@pytest.mark.parametrize("name", PINNED)
def test_pin_reason_names_the_operator(name):
    check_pin_reason(*PINNED[name])
