"""Folders of runs with synthetic results, as a training writes them, for tests of reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from lightning_prune import PruningRecord, trace
from lightning_prune.graph.summary import NetworkSummary
from lightning_prune.reporting.examples import Examples
from lightning_prune.reporting.layers import save_layers
from lightning_prune.reporting.model_size import Sizes
from lightning_prune.reporting.run_folder import Summary, save_net

NET = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 3, "kernel_size": 1}
CONFIG = {
    "net": NET,
    "data": {"_target_": "lightning_prune.data.BrainSlices", "size": 16},
    "prune": {"_target_": "lightning_prune.FilterPruningCallback", "budget": {"macs": 0.5}},
    "seed": 1,
}


def cut(epoch: int, share: float, **changes: Any) -> dict[str, Any]:
    """Return a cut as a summary keeps it."""
    values = {
        "epoch": epoch,
        "filters": 10,
        "layers": 2,
        "before": {"macs": 1000},
        "after": {"macs": int(1000 * share)},
        "share": {"macs": share, "params": share**2},
        "stopped": "amount",
        "seconds": 0.5,
        "step": None,
        "change": 0.001,
        "change_unrepaired": 0.02,
        "not_repaired": "",
        "left_alone": {},
    }
    return values | changes


def summary(**changes: Any) -> Summary:
    """Return the results of a run of four epochs with two cuts."""
    shares = [1.0, 0.8, 0.5, 0.5]
    rows = [
        {
            "epoch": epoch,
            "val/miou": 0.3 + 0.1 * epoch,
            "train/miou": 0.35 + 0.1 * epoch,
            "val/loss": 1.0 - 0.2 * epoch,
            "train/loss": 0.9 - 0.2 * epoch,
            "val/iou_grey": 0.2 + 0.1 * epoch,
            "prune/macs_share": share,
            "prune/params_share": share**2,
            "lr": 0.001 / (epoch + 1),
        }
        for epoch, share in enumerate(shares)
    ]
    values = {
        "status": "completed",
        "seed": 1,
        "epochs": 4,
        "seconds": 75.0,
        "device": "cpu",
        "threads": 2,
        "dense": Sizes(1_000_000, 100_000, 400_000, 10.0),
        "final": Sizes(500_000, 25_000, 100_000, 8.0),
        "test": {"loss": 0.1, "miou": 0.75, "iou_grey": 0.7},
        "curves": rows,
        "widths": {"encoder.conv1": (64, 24), "encoder.layer1.0.conv1": (128, 128), "head": (3, 3)},
        "cuts": [cut(1, 0.8), cut(2, 0.5)],
    }
    return Summary(**(values | changes))


def layers() -> NetworkSummary:
    """Return the layers of a small network before and after a cut."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
    return trace(net, torch.zeros(1, 1, 8, 8)).summary(remove=[0, 1])


def examples(sizes: tuple[tuple[int, int], ...] = ((16, 16), (12, 24))) -> Examples:
    """Return grey images of these sizes; the dense network is right but for one row, the pruned one but for two."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, size, dtype=np.uint8) for size in sizes]
    targets = [(image > 127).astype(np.int64) for image in images]
    dense, final = ([target.copy().astype(np.int16) for target in targets] for _ in range(2))
    for rows, outputs in ((1, dense), (2, final)):
        for mask in outputs:
            mask[:rows] = 2
    names = ["other", "grey", "white"]
    outputs = {"dense": dense, "final": final}
    return Examples(images, targets, outputs, names, dense_epoch=2, numbers=range(len(sizes)))


def write_run(folder: Path, pictures: Examples | None = None, **changes: Any) -> Path:
    """Write the folder of a run; ``changes`` are of its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    net = nn.Conv2d(1, 3, 1)
    summary(**changes).save(folder)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(CONFIG)))
    PruningRecord().save(folder / "record.json")
    save_net(folder / "net.pt", net, PruningRecord())
    save_layers(layers(), folder)
    (examples() if pictures is None else pictures).save(folder)
    return folder


def write_failed(folder: Path, error: str, **changes: Any) -> Path:
    """Write the folder of a run that failed."""
    folder.mkdir(parents=True)
    replace(Summary(), status="failed", error=error, **changes).save(folder)
    (folder / "error.txt").write_text(f"Traceback (most recent call last):\n{error}\n")
    return folder
