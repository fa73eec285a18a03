"""One of two processes that train on one device: ``python -m benchmarks.gpu.rank FOLDER SMALL DEVICE``."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from benchmarks.gpu.checks import Place
from benchmarks.gpu.networks import CUTS, Segmenter, gradual, loader, trainer_of, unet

__all__ = ["main"]


def main(folder: Path, small: bool, device: str) -> None:
    """Train, and write ``rankN.json``."""
    warnings.filterwarnings("ignore")
    place, rank = Place(torch.device(device), small, folder), int(os.environ["NODE_RANK"])
    on_gpu = place.device.type == "cuda"
    pruning, module = gradual(), Segmenter(unet(place))
    # Each process is a node of its own for Lightning: only so may both have the first GPU.
    trainer = trainer_of(
        place, [pruning], epochs=CUTS + 1, num_nodes=2, sync_batchnorm=on_gpu,
        strategy=DDPStrategy(process_group_backend="gloo"),
    )  # fmt: skip
    trainer.fit(module, loader(place, batch=4))
    digest = hashlib.sha256()
    # Without SyncBatchNorm each rank has statistics of its own.
    for tensor in module.state_dict().values() if on_gpu else module.parameters():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    assert pruning.record is not None
    result = {
        "bits": digest.hexdigest(),
        "record": pruning.record.to_dict(),
        "macs": [round(cut.share["macs"], 3) for cut in pruning.history],
        "losses": module.mean_losses(),
        "synchronised_norms": sum(isinstance(part, nn.SyncBatchNorm) for part in module.modules()),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), bool(int(sys.argv[2])), sys.argv[3])
