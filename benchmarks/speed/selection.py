"""How long it takes to select among 20,000 units under all limits; the aim is less than a second.

    python -m benchmarks.speed.selection

Prints the median over repeats of the seconds of processor time for one selection on a graph of 100 convolutions of
200 filters in blocks of four, with limits per layer (of parameters) and block (of channels), overrides, three
budgets, one of them in a function of the channels that is no product, and a channel multiple.
"""

from __future__ import annotations

import math
import statistics
import time

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


def stairs(*channels: int) -> float:
    """Hardware takes channels by the eight."""
    return math.prod(math.ceil(number / 8) for number in channels)


def chain() -> ChannelGraph:
    """3x3 convolutions in a row, named ``b<block>.c<number>``; later ones cost more."""
    layers = {f"b{i // 4}.c{i}.weight": np.arange(i * WIDTH, (i + 1) * WIDTH) for i in range(LAYERS)}
    reads = [(), *((units,) for units in layers.values())]
    pairs = list(zip(layers.items(), reads, strict=False))
    params = [Term(name, 9, (units, *read)) for (name, units), read in pairs]
    macs = [Term(name, 90 * (i + 1), (units, *read)) for i, ((name, units), read) in enumerate(pairs)]
    last = dict.fromkeys(range((LAYERS - 1) * WIDTH, LAYERS * WIDTH), "output of the network")
    seconds = [Term(t.layer, 1000 * t.scale, t.factors, stairs) for t in macs]
    terms = {"macs": macs, "params": params, "seconds": seconds}
    return ChannelGraph(LAYERS * WIDTH, {}, layers, dict.fromkeys(layers, 0), last, terms)


def timed(graph: ChannelGraph, seed: int) -> tuple[Plan, float]:
    """One selection by random scores, and its seconds."""
    scores = np.random.default_rng(seed).random(graph.num_units)
    start = time.process_time()
    plan = select(graph, scores, BUDGET, limits=LIMITS, channel_multiple=4)
    return plan, time.process_time() - start


def main() -> None:
    graph = chain()
    runs = [timed(graph, seed) for seed in range(REPEATS)]
    seconds = statistics.median(second for _, second in runs)
    plan = runs[0][0]
    print(f"{graph.num_units} units, {len(plan)} taken, {plan.ending}: {seconds:.2f} s (median of {REPEATS})")


if __name__ == "__main__":
    main()
