"""How the engine's cost grows: time over depth, and memory of tracing large networks.

    python -m benchmarks.speed.scaling

Residual networks of 50 to 1,600 layers: seconds of processor time for trace, surgery and proof, and the slope
of their logarithm over the logarithm of the number of layers (1 is linear). And the peak memory of tracing
``vit_large`` and ``convnext_xlarge`` beyond the model. Every measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from benchmarks.common.machine import machine, versions
from benchmarks.common.memory import peak_memory
from benchmarks.zoo.ours import random_half, warm_up
from lightning_prune import prune_, trace

DEPTHS = (50, 100, 200, 400, 800, 1600)
LARGE = ("vit_large_patch16_224", "convnext_xlarge")
MOST_MEGABYTES = 300
STEPS = ("trace", "cut and proof", "whole")


class Block(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Add to ``x`` what two layers make of it."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(inner)))


def residual(layers: int, width: int = 16) -> nn.Sequential:
    """A residual network of ``layers`` weight layers."""
    blocks = [Block(width) for _ in range((layers - 2) // 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *blocks, *head).eval()


def times(layers: int) -> dict[str, float]:
    """Processor seconds for one residual network, the better of two."""
    warm_up()
    return min((_once(layers) for _ in range(2)), key=lambda found: found["whole"])


def _once(layers: int) -> dict[str, float]:
    model = residual(layers)
    started = time.process_time()
    graph = trace(model, torch.zeros(1, 3, 16, 16))
    traced = time.process_time()
    remove = random_half(graph)
    chosen = time.process_time()
    prune_(model, graph, remove)
    ended = time.process_time()
    steps = (traced - started, ended - chosen)
    return {"layers": layers, **dict(zip(STEPS, (*steps, sum(steps)), strict=True))}


def memory(name: str) -> dict[str, Any]:
    """Peak memory of tracing a large network, beyond the model."""
    warm_up()
    model = timm.create_model(name).eval()
    example = torch.zeros(1, 3, 224, 224)
    with peak_memory() as peak:
        graph = trace(model, example)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    return {"network": name, "model_mb": size, "trace_mb": peak.megabytes, "units": graph.num_units}


def slope(rows: Sequence[dict[str, float]], step: str) -> float:
    """Slope of log(seconds) over log(layers).

    Example:
        >>> round(slope([{"layers": 10, "whole": 1.0}, {"layers": 100, "whole": 10.0}], "whole"), 3)
        1.0
    """
    layers, taken = ([np.log(row[key]) for row in rows] for key in ("layers", step))
    return float(np.polyfit(layers, taken, 1)[0])


def _alone(work: Callable[[], Any]) -> Any:
    with mp.get_context("spawn").Pool(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.apply(work)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and write ``scaling.md`` and ``scaling.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.scaling", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS))
    parser.add_argument("--large", nargs="*", default=list(LARGE))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[2] / "docs")
    asked = parser.parse_args(arguments)
    depth = [_alone(partial(times, layers)) for layers in asked.depths]
    large = [_alone(partial(memory, name)) for name in asked.large]
    write(depth, large, asked.docs)


def write(depth: list[dict[str, float]], large: list[dict[str, Any]], docs: Path) -> None:
    """Both tables, as JSON and Markdown."""
    slopes = {step: slope(depth, step) for step in STEPS}
    head = {"date": time.strftime("%Y-%m-%d %H:%M"), "versions": versions(), "machine": machine()}
    docs.mkdir(parents=True, exist_ok=True)
    found = {**head, "slopes": slopes, "depth": depth, "large": large}
    (docs / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        "# Scaling",
        "",
        f"{head['date']} · torch {versions()['torch']} · {head['machine']}. Made by `python -m benchmarks.speed.scaling`.",
        "",
        f"- **Slope of log(seconds) over log(layers): {slopes['whole']:.2f}** for the whole engine; 1 is linear.",
        f"- **Tracing takes at most {max((row['trace_mb'] for row in large), default=0):.0f} MB beyond the model** "
        f"(wanted: below {MOST_MEGABYTES}).",
        "",
        "Processor seconds on a residual network of so many layers (16 wide, 16 pixels), the better of two:",
        "",
        f"| layers | {' | '.join(STEPS)} |",
        "|---:|---:|---:|---:|",
        *(f"| {row['layers']} | {' | '.join(f'{row[step]:.2f}' for step in STEPS)} |" for row in depth),
        f"| slope | {' | '.join(f'{slopes[step]:.2f}' for step in STEPS)} |",
        "",
        "| network | model, MB | trace, MB beyond it | units |",
        "|---|---:|---:|---:|",
        *(f"| {r['network']} | {r['model_mb']:.0f} | {r['trace_mb']:.0f} | {r['units']} |" for r in large),
    ]
    (docs / "scaling.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
