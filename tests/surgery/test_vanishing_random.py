"""Tests of blocks that vanish from random stacks of residual blocks."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from lightning_prune import prune_, residual_blocks, trace
from tests.support.residual_nets import KINDS, Basic, Preactivated, Stack, largest_difference

#: autograd refuses to work in place on what a ReLU has saved, also before a block vanishes
IN_PLACE = {Basic, Preactivated}


def random_stack(seed: int) -> tuple[Stack, list[str]]:
    """Return a random network, and the names of random blocks of it."""
    draw = random.Random(seed)
    kinds = [draw.choice(KINDS) for _ in range(draw.randint(1, 6))]
    kinds = [kind for n, kind in enumerate(kinds) if not n or not {kind, kinds[n - 1]} <= IN_PLACE]
    while any({a, b} <= IN_PLACE for a, b in pairwise(kinds)):
        kinds.pop()
    torch.manual_seed(seed)
    net = Stack(kinds, width=draw.choice((4, 6, 8)), taps=draw.random() < 0.5)
    names = list(residual_blocks(net, torch.rand(2, 3, 8, 8)))
    return net, draw.sample(names, draw.randint(1, len(names)))


@pytest.mark.parametrize("seed", range(12))
def test_random_blocks_of_random_networks_vanish_exactly(seed):
    net, names = random_stack(seed)
    images = torch.rand(2, 3, 8, 8)
    difference, record = largest_difference(net, images, names)
    assert difference < 1e-4
    # Then channels go, too, and both records together give the same network.
    graph = trace(net, images)
    units = graph.prunable[:: 1 + len(graph.prunable) // 3]
    both = record.then(prune_(net, graph, units))
    again = both.apply_(random_stack(seed)[0])
    again.load_state_dict(net.state_dict())
    for model in (net, again):
        model.eval()
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
    left, right = net(images), again(images)
    pairs = zip(left, right, strict=True) if isinstance(left, tuple) else [(left, right)]
    assert all(torch.equal(a, b) for a, b in pairs)
