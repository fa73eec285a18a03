"""Peak memory and time of training dense, and of training that shrinks, with the same steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import segmentation_models_pytorch as smp
import torch

from benchmarks.gpu.checks import Check, Place
from benchmarks.gpu.networks import Segmenter, gradual, loader_on_device, trainer_of, unet

__all__ = ["CHECKS"]

DENSE, SHARES = 1.0, (1.0, 0.5, 0.26)


@dataclass
class Epochs(L.Callback):
    """Measures seconds and peak memory of every epoch, with all that other callbacks do at its end.

    Attributes:
        seconds: of each epoch.
        peaks: megabytes that torch has allocated at most in each epoch, network and optimizer included.
    """

    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the measurement."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the measurement."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            self.peaks.append(round(torch.cuda.max_memory_allocated() / 1e6, 1))
        self.seconds.append(round(time.perf_counter() - self.start, 3))


def training(place: Place) -> dict[str, Any]:
    """Train a U-Net dense, to half of the MACs and to 26 %, in bf16-mixed and channels last; two cuts with repair."""
    batch, batches, size = place.pick((32, 24, 256), (4, 2, 16))
    data, rows = loader_on_device(place, batch, batches, size), []
    _train(place, DENSE, loader_on_device(place, batch, 2, size), 1)  # cuDNN and the allocator warm up
    for share in SHARES:
        rows.append({"share": share, **_train(place, share, data, place.pick(8, 3))})
    dense, *others = rows
    for row in others:
        row["time_ratio"] = round(row["wall"] / dense["wall"], 3)
        row["last_epoch_ratio"] = round(row["seconds"][-1] / dense["seconds"][-1], 3)
        if row["peaks_mb"]:
            row["last_peak_ratio"] = round(row["peaks_mb"][-1] / dense["peaks_mb"][-1], 3)
    wrong = [f"{row['macs']} instead of {row['share']}" for row in rows if row["macs"] > row["share"] + 0.002]
    setting = {"batch": batch, "batches": batches, "size": size}
    return {**setting, "rows": rows, "wrong": wrong}


def _train(place: Place, share: float, data: Any, epochs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    net = unet(place) if place.small else smp.Unet("resnet34", encoder_weights=None, in_channels=3, classes=1)
    module = Segmenter(net.to(memory_format=torch.channels_last), channels_last=True)
    pruning, measured = gradual(share, cuts=2), Epochs()
    # Lightning calls callbacks in this order: memory and time are read after the cut.
    callbacks = [measured] if share == DENSE else [pruning, measured]
    start = time.perf_counter()
    trainer_of(place, callbacks, epochs, precision="bf16-mixed").fit(module, data)
    place.wait()
    wall, cuts = time.perf_counter() - start, [] if share == DENSE else pruning.history
    return {
        "wall": round(wall, 2),
        "seconds": measured.seconds,
        "peaks_mb": measured.peaks,
        "cut_seconds": [round(cut.seconds, 2) for cut in cuts],
        "repaired": sum(cut.change is not None and not cut.not_repaired for cut in cuts),
        "macs": round(cuts[-1].share["macs"], 3) if cuts else 1.0,
        "losses": module.mean_losses(),
    }


CHECKS = [Check("training dense and shrinking", "memory", training)]
