"""How long it takes to select among 20,000 units under all limits; the aim is less than a second.

    python -m benchmarks.selection

Prints the median over repeats of the seconds of processor time for one selection on a graph of 100 convolutions of
200 filters in blocks of four, with limits per layer and block, overrides, two budgets and a channel multiple.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from lightning_prune.graph import ChannelGraph, Term
from lightning_prune.limits import Limits
from lightning_prune.selection import Plan, select

LAYERS, WIDTH, REPEATS = 100, 200, 5
LIMITS = Limits(layers=0.8, blocks=0.75, overrides={"b3*": 0.5, "b4.*": 0.9})


def chain() -> ChannelGraph:
    """3x3 convolutions in a row, named ``b<block>.c<number>``; later ones cost more."""
    layers = {f"b{i // 4}.c{i}.weight": np.arange(i * WIDTH, (i + 1) * WIDTH) for i in range(LAYERS)}
    reads = [(), *((units,) for units in layers.values())]
    pairs = list(zip(layers.items(), reads, strict=False))
    params = [Term(name, 9, (units, *read)) for (name, units), read in pairs]
    macs = [Term(name, 90 * (i + 1), (units, *read)) for i, ((name, units), read) in enumerate(pairs)]
    last = dict.fromkeys(range((LAYERS - 1) * WIDTH, LAYERS * WIDTH), "output of the network")
    terms = {"macs": macs, "params": params}
    return ChannelGraph(LAYERS * WIDTH, {}, layers, dict.fromkeys(layers, 0), last, terms)


def timed(graph: ChannelGraph, seed: int) -> tuple[Plan, float]:
    """One selection by random scores, and its seconds."""
    scores = np.random.default_rng(seed).random(graph.num_units)
    start = time.process_time()
    plan = select(graph, scores, {"macs": 0.3, "params": 0.4}, limits=LIMITS, channel_multiple=4)
    return plan, time.process_time() - start


def main() -> None:
    graph = chain()
    runs = [timed(graph, seed) for seed in range(REPEATS)]
    seconds = statistics.median(second for _, second in runs)
    print(f"{graph.num_units} units, {len(runs[0][0])} taken: {seconds:.2f} s (median of {REPEATS})")


if __name__ == "__main__":
    main()
