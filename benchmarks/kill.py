"""Twenty times: kill -9 a pruning run, resume it in a new process, and compare with a run that was left alone.

    python -m benchmarks.kill                     # rewrites docs/kill.md; five minutes
    python -m benchmarks.kill --kills 3 --seed 5  # only shows its table

The run has everything that must go on: dropout, augmentation by three random generators, a shuffled loader,
batch norm, momentum, a plateau scheduler, statistics gathered over an epoch, and three checkpoint callbacks. It
dies inside surgery (some tensors cut, others not), inside the writing of a checkpoint (half of the file
written), inside validation, and at moments that only the clock chooses. Equal means: every bit of weights,
buffers, optimizer and scheduler state, the record, and the cuts.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_prune import FilterPruningCallback, surgery
from lightning_prune.checkpoint_io import AtomicCheckpointIO, last_checkpoint
from lightning_prune.criteria import IPAD

ROOT = Path(__file__).parents[1]
EPOCHS, BATCHES = 8, 5
POINTS = ("surgery", "writing", "validation", "anywhere")


class Stripes(Dataset):
    """Stripes of four kinds in noise, augmented by all the random generators there are."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = (torch.arange(144) % (index % 4 + 2) == 0).float().reshape(1, 12, 12)
        drawn = 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002 - the global one is to be restored
        image = image + 0.3 * torch.randn(image.shape) + drawn
        return image, index % 4


class Classifier(L.LightningModule):
    """Small, with dropout, momentum and a plateau scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 4)."""
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        """Log the loss, on noisy images."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        """Adam, and a scheduler that reacts to every rise of the validation loss."""
        optimizer = torch.optim.Adam(self.parameters(), 1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


def shuffled(**arguments: Any) -> tuple[DataLoader, DataLoader]:
    """Loaders for training and validation."""
    return DataLoader(Stripes(), 4, shuffle=True, **arguments), DataLoader(Stripes(), 4)


def pruning(**changes: Any) -> FilterPruningCallback:
    """Both terms of IPAD, so that statistics are gathered."""
    arguments = {
        "budget": {"macs": 0.5},
        "optimizer": "carry",
        "criterion": IPAD(omega=0.5),
        "verbose": False,
    }
    return FilterPruningCallback(**(arguments | changes))


def fit(
    module: L.LightningModule,
    loaders: Sequence[DataLoader],
    callbacks: Sequence[L.Callback],
    resume: Path | None,
    **arguments: Any,
) -> dict[str, Any]:
    """One run, from its beginning or from a checkpoint; everything that there is at its end."""
    L.seed_everything(0 if resume is None else 12345, verbose=False)  # what resumes gets no help from seeds
    for layer in module.net:
        getattr(layer, "reset_parameters", bool)()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(held, ModelCheckpoint) for held in callbacks),
        plugins=[AtomicCheckpointIO()],
        **arguments,
    )
    trainer.fit(module, *loaders, ckpt_path=resume)
    (callback,) = (held for held in callbacks if isinstance(held, FilterPruningCallback))
    return {
        "weights": dict(module.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "record": callback.record.to_dict() if callback.record else None,
        "cuts": [(cut.epoch, cut.filters, cut.after) for cut in callback.history],
        "epoch": trainer.current_epoch,
        "step": trainer.global_step,
    }


def same(a: Any, b: Any) -> bool:
    """Equal, bit by bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


# -- the process that dies -------------------------------------------------------------------------------------


def die(*_: Any, **__: Any) -> None:
    """As by ``kill -9``: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(checkpoint: Any, file: Any) -> None:
    """What a process that is killed while it writes leaves behind."""
    buffer = io.BytesIO()
    save(checkpoint, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    die()


save = torch.save


def arm(point: str, count: int) -> None:
    """Die when ``point`` is reached for the ``count``-th time."""
    owner: Any
    owner, name, end = {
        "surgery": (surgery, "set_data", die),
        "writing": (torch, "save", write_half),
        "validation": (Classifier, "validation_step", die),
    }[point]
    before, left = getattr(owner, name), count

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        return end(*args) if left == 0 else before(*args, **kwargs)

    setattr(owner, name, counted)


def checkpointed(folder: Path) -> dict[str, Any]:
    """Train with checkpoints, from the last one that is whole; what there is at the end."""
    keep = [
        ModelCheckpoint(folder / "steps", every_n_train_steps=2),
        ModelCheckpoint(folder / "validated", save_on_train_epoch_end=False),
        ModelCheckpoint(folder / "epochs", save_on_train_epoch_end=True, every_n_epochs=2),
    ]
    return fit(Classifier(), shuffled(), [pruning(), *keep], last_checkpoint(folder), max_epochs=EPOCHS)


def child(folder: Path, point: str, count: int) -> None:
    """Train, and die at ``point`` or write what there is at the end."""
    if point in POINTS[:3]:
        arm(point, count)
    print("training", flush=True)
    save(checkpointed(folder), folder / "final.pt")


# -- the process that kills ------------------------------------------------------------------------------------


def start(folder: Path, point: str = "", count: int = 0) -> subprocess.Popen[str]:
    """A run in a process of its own, as far as its first line: from there on it trains."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.kill",
        "--child",
        str(folder),
        point,
        str(count),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert run.stdout is not None
    with run.stdout as lines:
        lines.readline()
    return run


def undisturbed() -> dict[str, Any]:
    """The result of the run that nobody kills, in this process."""
    return fit(Classifier(), shuffled(), [pruning()], None, max_epochs=EPOCHS)


def to_its_end(folder: Path) -> tuple[Any, float]:
    """The result of a run that nobody kills, in a process of its own, and how many seconds it trained."""
    run = start(folder)
    since = time.monotonic()
    if run.wait() != 0:
        raise RuntimeError(f"the run in {folder} failed; try python -m benchmarks.kill --child {folder} '' 0")
    return torch.load(folder / "final.pt", weights_only=True), time.monotonic() - since


def killed(folder: Path, point: str, draw: random.Random, seconds: float = 0) -> tuple[str, str]:
    """Start a run and kill it: where it died, and what there is to resume from."""
    most = {"surgery": 20, "writing": 30, "validation": EPOCHS * BATCHES, "anywhere": 0}[point]
    count, delay = (draw.randint(1, most), 0.0) if most else (0, draw.uniform(0, seconds))
    run = start(folder, point, count)
    if point == "anywhere":
        time.sleep(delay)
        run.kill()
    where = f"{point}, call {count}" if count else f"after {delay:.2f} s"
    if run.wait() != -signal.SIGKILL:
        where += " (had ended)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = last_checkpoint(folder)
    return where, str(found.relative_to(folder)) if found else "the beginning"


def report(kills: int, seed: int) -> tuple[str, bool]:
    """The table, and whether all runs came out the same."""
    draw, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory() as parent:
        whole, seconds = to_its_end(Path(parent) / "whole")
        for number in range(kills):
            point = POINTS[number % len(POINTS)]
            folder = Path(parent) / str(number)
            where, source = killed(folder, point, draw, seconds)
            found, _ = to_its_end(folder)
            rows.append((number + 1, where, source, "yes" if same(found, whole) else "NO"))
            print(*rows[-1], sep=" | ", flush=True)
    lines = ["| kill | where | resumed from | same bits at the end |", "|--:|:--|:--|:--|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines), all(row[-1] == "yes" for row in rows)


def main() -> None:
    """Kill, resume, compare, and write the page if nothing was asked for in particular."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "POINT", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(Path(given.child[0]), given.child[1], int(given.child[2]))
        return
    table, good = report(given.kills, given.seed)
    if (given.kills, given.seed) == (20, 0):
        page = f"# Killed and resumed\n\n`python -m benchmarks.kill` (torch {torch.__version__}, CPU)\n\n{table}\n"
        (ROOT / "docs" / "kill.md").write_text(page)
    raise SystemExit(0 if good else "a resumed run ended differently")


if __name__ == "__main__":
    main()
