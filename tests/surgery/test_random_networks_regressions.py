"""Every failure that random networks ever found, as a minimal network of its own.

A failure is a wrong network, an error that is no refusal, or a refusal of units that the trace called prunable.
"""

from __future__ import annotations

import pytest

from tests.support.random_cuts import examine
from tests.support.random_nets import N, Net

HEADS = {"heads": 2, "product": "unscaled", "residual": False}
MINIMAL = {
    "depthwise convolution keeps one channel": Net((N("Ghost", ratio=2),)),
    "channels meet a gate of one channel and one is left": Net((N("SqueezeExcite", ratio=3, style="one"),)),
    "channels meet their own sum and one is left": Net((N("ChannelSum", how="sum"),)),
    "head size is the input's channels by the heads": Net(
        (N("Attention", style="from_input", merge="input", **HEADS),)
    ),
    "queries alone have the input's channels by the heads": Net(
        (N("Attention", style="kv", merge="own", **HEADS),)
    ),
    "heads come before queries, keys and values, and one is left": Net(
        (N("Attention", style="head_major", merge="flatten", **{**HEADS, "product": "einsum"}),)
    ),
    "flattened by the shape of a sum with what was viewed": Net((N("Mixer", hidden=5),), head="reshape"),
    "half of the channels as a plain number": Net(
        (N("Split", [N("Pixels", kind="shuffle")], [], style="slice_number", join="cat"), N("Ghost", ratio=2))
    ),
}
EMPTIED = {
    "a part of a split by two attributes is emptied": N("Partial", [], style="list"),
    "a part of a split by a list is emptied": N("Split", [], [], style="split_list", join="cat"),
}


@pytest.mark.parametrize("net", MINIMAL.values(), ids=[name.replace(" ", "-") for name in MINIMAL])
def test_cuts_are_proven_and_right(net: Net) -> None:
    cases = [(0, 0.1), (0, 0.5), (0, 1.0), (1, 0.1), (3, 0.8)]
    outcomes = [examine(net, *case) for case in cases]
    assert [outcome.refusals for outcome in outcomes] == [[]] * len(outcomes)
    assert all(outcome.cuts for outcome in outcomes)


@pytest.mark.parametrize("node", EMPTIED.values(), ids=[name.replace(" ", "-") for name in EMPTIED])
def test_what_would_empty_a_part_is_refused(node: N) -> None:
    net = Net((node,))
    for seed in range(7):  # a record that cannot be applied to the dense network is wrong
        examine(net, seed, 0.6)
