"""Time of one selection among 20,000 units under all limits; the goal is less than a second.

    python -m benchmarks.speed.selection

Prints the median processor time over repeats. The graph is a chain of 100 convolutions with 200 filters each, in
blocks of four. The selection has a limit per layer (of parameters) and per block (of channels), overrides, three
budgets, and a channel multiple. One budget is of a resource that is not a product of channel counts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence

import numpy as np

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import Term
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.plan import Plan
from lightning_prune.selection.select import select

LAYERS, WIDTH, REPEATS = 100, 200, 5
CHANNELS = {"share": 0.75, "of": "channels"}
BLOCKS = {f"b{block}": CHANNELS for block in range(LAYERS // 4)}
LIMITS = Limits(layers=0.8, overrides={**BLOCKS, "b3.*": 0.5, "b4.*": 0.9})
BUDGET = {"macs": 0.3, "params": 0.4, "seconds": 0.35}


def staircase(*channels: int) -> float:
    """Return a cost that rises with every eighth channel, as on hardware that computes channels by eights."""
    return math.prod(math.ceil(number / 8) for number in channels)


def chain() -> ChannelGraph:
    """Return a graph of 3x3 convolutions in a row, named ``b<block>.c<number>``; later ones cost more."""
    layers = {f"b{i // 4}.c{i}.weight": np.arange(i * WIDTH, (i + 1) * WIDTH) for i in range(LAYERS)}
    inputs = [(), *((units,) for units in layers.values())]
    layer_inputs = list(zip(layers.items(), inputs, strict=False))
    params = [Term(name, 9, (units, *read)) for (name, units), read in layer_inputs]
    macs = [Term(name, 90 * (i + 1), (units, *read)) for i, ((name, units), read) in enumerate(layer_inputs)]
    last = dict.fromkeys(range((LAYERS - 1) * WIDTH, LAYERS * WIDTH), "output of the network")
    seconds = [Term(t.layer, 1000 * t.scale, t.factors, staircase) for t in macs]
    terms = {"macs": macs, "params": params, "seconds": seconds}
    return ChannelGraph(LAYERS * WIDTH, {}, layers, dict.fromkeys(layers, 0), last, terms)


def timed(graph: ChannelGraph, seed: int) -> tuple[Plan, float]:
    """Return one selection by random scores, and its seconds."""
    scores = np.random.default_rng(seed).random(graph.num_units)
    start = time.process_time()
    plan = select(graph, scores, BUDGET, limits=LIMITS, channel_multiple=4)
    return plan, time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.speed.selection", description=__doc__.split("\n")[0]
    ).parse_args(arguments)
    graph = chain()
    runs = [timed(graph, seed) for seed in range(REPEATS)]
    seconds = statistics.median(second for _, second in runs)
    plan = runs[0][0]
    print(
        f"{graph.num_units} units, {len(plan)} removed, {plan.ending}: {seconds:.2f} s (median of {REPEATS})"
    )


if __name__ == "__main__":
    main()
