"""Seconds of tracing, and of a cut with its proof, for each of 25 networks, as a Markdown table.

    python -m benchmarks.speed.tracing [--threads 1] [--repeats 3] [--only resnet]

Each number is the median over the repeats. Every repeat builds the network with new random weights and removes
another random half of its prunable units. The networks are those of the oracle tests.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision.models as tv
from torch import nn

from lightning_prune import ChannelGraph, prune_, trace
from lightning_prune.tracing.ids import Units

DECODERS = ["Unet", "UnetPlusPlus", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "MAnet"]
ENCODERS = ["mobilenet_v2", "efficientnet-b0", "densenet121"]
TORCHVISION = [
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "googlenet",
    "mobilenet_v3_large",
    "regnet_y_400mf",
    "vgg16_bn",
    "densenet121",
]
TIMM = {
    "vit_tiny_patch16_224": 224,
    "res2net50_26w_4s": 224,
    "cspresnet50": 224,
    "levit_128s": 224,
    "botnet26t_256": 256,
}


@dataclass(frozen=True)
class Row:
    """Result of one network: medians in seconds, and the share of MACs after the cut."""

    name: str
    parameters: int
    units: int
    trace: float
    cut: float
    macs_left: float

    def __str__(self) -> str:
        cells = f"{self.trace:.2f} | {self.cut:.2f} | {self.units} | {self.macs_left:.0%}"
        return f"| {self.name} | {self.parameters / 1e6:.1f} M | {cells} |"


HEADER = "| network | parameters | trace, s | cut and proof, s | units | MACs left |\n|---|---:|---:|---:|---:|---:|"


def networks() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """Yield name, builder and input size of each network."""
    for name in DECODERS:
        yield (
            f"smp {name}, resnet34",
            functools.partial(getattr(smp, name), "resnet34", encoder_weights=None),
            256,
        )
    for name in ENCODERS:
        yield f"smp Unet, {name}", functools.partial(smp.Unet, name, encoder_weights=None), 256
    for name in TORCHVISION:
        options = {"init_weights": False} if name == "googlenet" else {}
        yield f"torchvision {name}", functools.partial(getattr(tv, name), weights=None, **options), 224
    for name, size in TIMM.items():
        yield f"timm {name}", functools.partial(timm.create_model, name), size


def random_half(graph: ChannelGraph, seed: int) -> Units:
    """Return a random half of the prunable units that leaves at least one unit in every dimension."""
    remove = np.random.default_rng(seed).permutation(graph.prunable)[: len(graph.prunable) // 2]
    for dims in graph.bindings.values():
        for units in dims.values():
            if not graph.kept(remove)[units].any():
                remove = remove[remove != units[0]]
    return remove


def measure(name: str, build: Callable[[], nn.Module], size: int, repeats: int) -> Row:
    """Build, trace and cut a network ``repeats`` times, and return the medians."""
    traces, cuts = [], []
    for seed in range(repeats):
        torch.manual_seed(seed)
        model, x = build(), torch.zeros(1, 3, size, size)
        start = time.perf_counter()
        graph = trace(model, x)
        traces.append(time.perf_counter() - start)
        remove = random_half(graph, seed)
        start = time.perf_counter()
        prune_(model, graph, remove)
        cuts.append(time.perf_counter() - start)
    left = graph.cost("macs", remove) / graph.cost("macs")
    medians = statistics.median(traces), statistics.median(cuts)
    return Row(name, graph.cost("params"), len(graph.prunable), *medians, left)


def geometric_mean(times: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(times)))))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.tracing", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="only networks whose name contains this text")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table row by row, and the geometric means."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    measure("warm-up", lambda: tv.resnet18(weights=None), 64, 1)
    print(f"Median of {args.repeats}, {args.threads} thread(s), torch {torch.__version__}, on the CPU.\n")
    print(HEADER, flush=True)
    rows = []
    for name, build, size in networks():
        if args.only in name:
            rows.append(measure(name, build, size, args.repeats))
            print(rows[-1], flush=True)
    if rows:
        trace_mean, cut_mean = (geometric_mean(getattr(row, key) for row in rows) for key in ("trace", "cut"))
        print(f"\nGeometric mean: {trace_mean:.2f} s and {cut_mean:.2f} s.")


if __name__ == "__main__":
    main()
