"""Growth of time with the number of layers, and memory of tracing large networks.

    python -m benchmarks.speed.scaling             # writes docs/results/scaling.md and data/scaling.json
    python -m benchmarks.speed.scaling --report    # only writes the page again, from the JSON

Residual networks of 50 to 1,600 layers: seconds of processor time for trace, surgery and proof, and the slope
of their logarithm over the logarithm of the number of layers (1 is linear). And the peak memory of tracing
``vit_large`` and ``convnext_xlarge`` beyond the model. Each measurement runs in a process of its own.
"""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from benchmarks.common.machine import machine, versions
from benchmarks.common.memory import peak_memory
from benchmarks.common.pages import ReportFiles, page_parser
from benchmarks.zoo.ours import random_half, warm_up
from lightning_prune import prune_, trace

DEPTHS = (50, 100, 200, 400, 800, 1600)
LARGE = ("vit_large_patch16_224", "convnext_xlarge")
MAX_MEGABYTES = 300
STEPS = ("trace", "cut and proof", "whole")


class Block(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` and the output of two layers, after ReLU: same shape as ``x``."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(inner)))


def residual(layers: int, width: int = 16) -> nn.Sequential:
    """Return a residual network of ``layers`` weight layers."""
    blocks = [Block(width) for _ in range((layers - 2) // 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *blocks, *head).eval()


def times(layers: int) -> dict[str, float]:
    """Return the processor seconds of each step for one residual network, the faster of two runs."""
    warm_up()
    return min((_run_steps(layers) for _ in range(2)), key=lambda seconds: seconds["whole"])


def _run_steps(layers: int) -> dict[str, float]:
    model = residual(layers)
    start = time.process_time()
    graph = trace(model, torch.zeros(1, 3, 16, 16))
    trace_seconds = time.process_time() - start
    remove = random_half(graph)
    start = time.process_time()
    prune_(model, graph, remove)
    cut_seconds = time.process_time() - start
    seconds = (trace_seconds, cut_seconds, trace_seconds + cut_seconds)
    return {"layers": layers, **dict(zip(STEPS, seconds, strict=True))}


def memory(name: str) -> dict[str, Any]:
    """Return the peak memory of tracing a network of timm, beyond the model."""
    warm_up()
    model = timm.create_model(name).eval()
    example = torch.zeros(1, 3, 224, 224)
    with peak_memory() as peak:
        graph = trace(model, example)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    return {"network": name, "model_mb": size, "trace_mb": peak.megabytes, "units": graph.num_units}


def slope(rows: Sequence[dict[str, float]], step: str) -> float:
    """Return the slope of log(seconds) over log(layers).

    Example:
        >>> round(slope([{"layers": 10, "whole": 1.0}, {"layers": 100, "whole": 10.0}], "whole"), 3)
        1.0
    """
    layers, seconds = ([np.log(row[key]) for row in rows] for key in ("layers", step))
    return float(np.polyfit(layers, seconds, 1)[0])


def _run_alone(work: Callable[[], Any]) -> Any:
    with mp.get_context("spawn").Pool(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.apply(work)


def page(content: dict[str, Any]) -> str:
    """Return the page (Markdown) of the stored numbers."""
    slopes, depth, large = content["slopes"], content["depth"], content["large"]
    most = max((row["trace_mb"] for row in large), default=0)
    lines = [
        "# Scaling",
        "",
        f"{content['date']} · torch {content['versions']['torch']} · {content['machine']}. "
        "Made by `python -m benchmarks.speed.scaling`.",
        "",
        f"- **Slope of log(seconds) over log(layers): {slopes['whole']:.2f}** for all steps together; 1 is linear.",
        f"- **Tracing takes at most {most:.0f} MB beyond the model** (goal: below {MAX_MEGABYTES}).",
        "",
        "Processor seconds for residual networks (16 channels, input of 16 x 16), the faster of two runs:",
        "",
        f"| layers | {' | '.join(STEPS)} |",
        "|---:|---:|---:|---:|",
        *(f"| {row['layers']} | {' | '.join(f'{row[step]:.2f}' for step in STEPS)} |" for row in depth),
        f"| slope | {' | '.join(f'{slopes[step]:.2f}' for step in STEPS)} |",
        "",
        "Peak memory of tracing:",
        "",
        "| network | model, MB | trace, MB beyond the model | units |",
        "|---|---:|---:|---:|",
        *(f"| {r['network']} | {r['model_mb']:.0f} | {r['trace_mb']:.0f} | {r['units']} |" for r in large),
    ]
    return "\n".join(lines) + "\n"


def measure(depths: Sequence[int], large: Sequence[str]) -> dict[str, Any]:
    """Measure everything, each network in a process of its own, and return what the JSON holds."""
    depth = [_run_alone(partial(times, layers)) for layers in depths]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "versions": versions(),
        "machine": machine(),
        "slopes": {step: slope(depth, step) for step in STEPS},
        "depth": depth,
        "large": [_run_alone(partial(memory, name)) for name in large],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = page_parser("speed.scaling", __doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS), help="numbers of layers")
    parser.add_argument("--large", nargs="*", default=list(LARGE), help="networks of timm")
    args = parser.parse_args(arguments)
    files = ReportFiles("scaling", args.docs)
    if not args.report:
        files.save(measure(args.depths, args.large))
    files.write_page(page(files.load()))


if __name__ == "__main__":
    main()
