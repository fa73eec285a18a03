"""The layers that each criterion cuts in one step, and the test score before any retraining.

    python -m benchmarks.criteria.layers    # a minute after the dense network is trained; docs/results/criteria.md

One cut of a trained U-Net to 71 % of the MACs. The table explains why IPAD with omega below 1 fails where batch norms
follow the convolutions.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.common.pages import RESULTS, ReportFiles
from benchmarks.criteria.methods import Ours
from benchmarks.criteria.tasks import Task, fit, score, trained
from lightning_prune.criteria import IPAD, Criterion, Random, TaylorGate

SHARE = 0.71
CRITERIA: dict[str, Criterion] = {
    "random": Random(0),
    "omega 1": IPAD(1.0),
    "omega 0.5": IPAD(0.5),
    "omega 0": IPAD(0.0),
    "omega 0, by layer": IPAD(0.0, normalise="layer"),
    "omega 0.5, global": IPAD(0.5, scale="global"),
    "Taylor, gates": TaylorGate(),
}


def stage(layer: str) -> str:
    """Return the stage of a layer: ``encoder.layer1.0.conv1.weight`` -> ``encoder.layer1``.

    In the decoder a stage is one block.
    """
    parts = layer.split(".")
    return ".".join(parts[: 3 if parts[0] == "decoder" else 2])


def by_stage(widths: Mapping[str, int]) -> dict[str, int]:
    """Return the number of channels of each stage."""
    channels: dict[str, int] = defaultdict(int)
    for layer, width in widths.items():
        channels[stage(layer)] += width
    return dict(channels)


def cut(dense: Task, criterion: Criterion) -> tuple[dict[str, float], float]:
    """Return the share of channels that each stage keeps, and the test mIoU directly after the cut."""
    task = copy.deepcopy(dense)
    method = Ours(task, criterion)
    fit(task, 1, method.callbacks(), lr=0.0)
    before = by_stage(method.run.graph.widths())
    method.cut(SHARE)
    after = by_stage(method.run.graph.widths())
    return {name: after[name] / width for name, width in before.items()}, score(task)


def table(results: Mapping[str, tuple[Mapping[str, float], float]], dense: float) -> str:
    """Return the table (Markdown): a row for each stage, a column for each criterion."""
    stages = next(iter(results.values()))[0]
    lines = [f"| channels kept | {' | '.join(results)} |", "|:--|" + "--:|" * len(results)]
    for name in stages:
        lines.append(
            f"| `{name}` | " + " | ".join(f"{kept[name]:.0%}" for kept, _ in results.values()) + " |"
        )
    scores = " | ".join(f"**{miou:.3f}**" for _, miou in results.values())
    return "\n".join([*lines, f"| test mIoU after the cut (dense {dense:.3f}) | {scores} |"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.criteria.layers", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/criteria"), help="folder of the dense network"
    )
    parser.add_argument("--docs", type=Path, default=RESULTS, help="folder of the page")
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dense = trained("brain", 0, args.folder, small=False)
    results = {name: cut(dense, criterion) for name, criterion in CRITERIA.items()}
    title = f"`python -m benchmarks.criteria.layers`: one cut to {SHARE:.0%} of the MACs, seed 0, no retraining.\n"
    ReportFiles("criteria", args.docs).write_section("layers", f"{title}\n{table(results, score(dense))}")


if __name__ == "__main__":
    main()
