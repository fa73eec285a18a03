"""Every failure that random networks ever found, as a minimal network of its own.

A failure is a wrong network, an error that is no refusal, or a refusal of units that the trace called prunable.
"""

from __future__ import annotations

from typing import Any

import pytest
from random_cuts import examine
from random_nets import N, Net

MINIMAL = {
    "depthwise convolution keeps one channel": [N("Ghost", ratio=2)],
    "channels meet a gate of one channel and one is left": [N("SqueezeExcite", ratio=3, style="one")],
    "channels meet their own sum and one is left": [N("ChannelSum", how="sum")],
    "head size is the number of the input's channels by the heads": [
        N("Attention", heads=2, style="from_input", product="unscaled", merge="input", residual=False)
    ],
}
OPEN = {
    "head size is the number of the input's channels by the heads": "the input's channels are not pinned",
}


def _cases() -> list[Any]:
    return [
        pytest.param(
            body, id=name.replace(" ", "-"), marks=[pytest.mark.xfail(reason=OPEN[name], strict=True)]
        )
        if name in OPEN
        else pytest.param(body, id=name.replace(" ", "-"))
        for name, body in MINIMAL.items()
    ]


@pytest.mark.parametrize("body", _cases())
def test_cuts_are_proven_and_right(body: list[N]) -> None:
    net = Net(tuple(body))
    outcomes = [
        examine(net.build(), net.example(), seed, share, net.by_weights())
        for seed in range(2)
        for share in (0.1, 0.5, 1.0)
    ]
    assert [outcome.refusals for outcome in outcomes] == [[]] * len(outcomes)
    assert all(outcome.cuts for outcome in outcomes)
