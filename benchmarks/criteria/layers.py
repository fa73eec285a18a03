"""Where does a criterion cut, and what does that do before any retraining? One cut of a trained U-Net.

    python -m benchmarks.criteria.layers              # a minute, after the dense network is trained; docs/criteria.md

Explains why IPAD with omega below 1 fails where batch norms follow the convolutions: see the page.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.common.pages import replace_between
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
    """``encoder.layer1.0.conv1.weight`` -> ``encoder.layer1``; one block of the decoder."""
    parts = layer.split(".")
    return ".".join(parts[: 3 if parts[0] == "decoder" else 2])


def by_stage(widths: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for layer, width in widths.items():
        found[stage(layer)] += width
    return dict(found)


def cut(dense: Task, criterion: Criterion) -> tuple[dict[str, float], float]:
    """Share of each stage's channels that stays, and the test mIoU right after the cut."""
    task = copy.deepcopy(dense)
    method = Ours(task, criterion)
    fit(task, 1, method.callbacks(), lr=0.0)
    before = by_stage(method.run.graph.widths())
    method.cut(SHARE)
    after = by_stage(method.run.graph.widths())
    return {name: after[name] / width for name, width in before.items()}, score(task)


def table(found: Mapping[str, tuple[Mapping[str, float], float]], dense: float) -> str:
    stages = next(iter(found.values()))[0]
    lines = [f"| channels kept | {' | '.join(found)} |", "|:--|" + "--:|" * len(found)]
    for name in stages:
        lines.append(f"| `{name}` | " + " | ".join(f"{kept[name]:.0%}" for kept, _ in found.values()) + " |")
    after = " | ".join(f"**{miou:.3f}**" for _, miou in found.values())
    return "\n".join([*lines, f"| test mIoU after the cut (dense {dense:.3f}) | {after} |"])


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dense = trained("brain", 0, Path("outputs/criteria"), small=False)
    found = {name: cut(dense, criterion) for name, criterion in CRITERIA.items()}
    said = f"`python -m benchmarks.criteria.layers`: one cut to {SHARE:.0%} of the MACs, seed 0, no retraining.\n"
    docs = Path(__file__).parents[2] / "docs" / "criteria.md"
    replace_between(docs, "layers", "\n".join([said, table(found, score(dense))]))


if __name__ == "__main__":
    main()
