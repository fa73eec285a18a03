"""Cost of a teacher: time of training steps with and without it, and memory over ten epochs.

    python -m benchmarks.distillation.cost                     # U-Net, 64 x 64, batch of 8; a minute or two
    python -m benchmarks.distillation.cost --size 256 --accelerator gpu

Every other batch of one training is distilled, first with Hinton's loss, then with all three losses on taps chosen
automatically. So other load on the machine affects both kinds of step alike. Processor time on a CPU, wall-clock time
on other devices.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import segmentation_models_pytorch as smp
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.distillation.config import Distillation
from lightning_prune.segmentation.module import SegmentationModule

BATCH, BATCHES, EPOCHS = 8, 8, 10


def now(device: torch.device) -> float:
    """Return seconds: processor time on a CPU, else wall-clock time after all kernels have ended."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class AlternatingTeacher(L.Callback):
    """Distils every other batch; records the times of both kinds of step and of the teacher, and the memory."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {"without": [], "with": [], "teacher": []}
        self.megabytes: list[float] = []
        self.start = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Switch the teacher on or off."""
        pl_module.distillation.callback.started = batch_idx % 2 == 1
        self.start = now(pl_module.device)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the time of the step, and that of one forward of the teacher."""
        kind = "with" if batch_idx % 2 else "without"
        self.times[kind].append(now(pl_module.device) - self.start)
        start = now(pl_module.device)
        pl_module.distillation.callback.teacher.run(((batch[0],), {}))
        self.times["teacher"].append(now(pl_module.device) - start)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the megabytes of all tensors in memory."""
        gc.collect()
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors()}
        self.megabytes.append(round(sum(sizes.values()) / 2**20, 2))


def tensors() -> list[Tensor]:
    """Return all tensors in memory. ``type()``, since ``isinstance`` would run code of proxy objects."""
    return [item for item in gc.get_objects() if issubclass(type(item), Tensor) and not item.is_meta]


def net() -> torch.nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=3)


def measure(size: int, accelerator: str, losses: dict[str, float]) -> dict[str, Any]:
    """Train with the given weights of losses; return medians of times, their ratio, and the memory per epoch."""
    images = torch.rand(BATCH * BATCHES, 1, size, size)
    data = DataLoader(TensorDataset(images, (3 * images[:, 0]).long().clamp(max=2)), BATCH)
    module = SegmentationModule(net(), 3, example_input_shape=(1, 1, size, size))
    module.distillation = Distillation(net(), submodule="net", **losses)
    callback = AlternatingTeacher()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator=accelerator,
        devices=1,
        callbacks=[callback],
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data)
    # The first epoch warms up.
    seconds = {name: statistics.median(times[BATCHES:]) for name, times in callback.times.items()}
    ratio = seconds["with"] / (seconds["without"] + seconds["teacher"])
    rounded = {f"ms {name}": round(1000 * value, 1) for name, value in seconds.items()}
    return {
        **rounded,
        "with / (without + teacher)": round(ratio, 3),
        "MB after each epoch": callback.megabytes,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation.cost", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--accelerator", default="cpu")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    all_losses = {"alpha": 1.0, "beta": 10.0, "lambda_": 0.1}
    for name, losses in {"hinton": {"alpha": 1.0}, "all": all_losses}.items():
        result = measure(args.size, args.accelerator, losses)
        print(json.dumps({"losses": name, "size": args.size, **result}))


if __name__ == "__main__":
    main()
