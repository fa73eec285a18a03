"""A run of two processes of which one is killed: ``python ddp_killed.py FOLDER [RANK]`` in each process."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_prune import AtomicCheckpointIO, last_checkpoint
from tests.support.ddp_modules import Net, loader, prune

KILL_EPOCH, EPOCHS = 2, 4


class KillRank(L.Callback):
    """Kills the process with this rank in the second batch of an epoch, after the first cut."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if (trainer.current_epoch, index, trainer.global_rank) == (KILL_EPOCH, 1, self.rank):
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, killed_rank: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    module, pruning = Net(), prune(start_epoch=0)
    checkpoints, resume = folder / "checkpoints", last_checkpoint(folder)
    keep = ModelCheckpoint(checkpoints, filename="{epoch}", save_on_train_epoch_end=True)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pruning, keep, KillRank(killed_rank)],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(module, loader(), ckpt_path=resume)
    result = {
        "state": dict(module.state_dict()),
        "record": pruning.record.to_dict() if pruning.record else None,
        "cuts": [cut.epoch for cut in pruning.history],
        "within_budget": pruning.within_budget,
    }
    torch.save(result, folder / f"result {trainer.global_rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
