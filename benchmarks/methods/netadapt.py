"""One search by one worker and by two: the same bits, and how much sooner.

    python -m benchmarks.methods.netadapt              # one round of a U-Net on brain slices; minutes
    python -m benchmarks.methods.netadapt --rounds 2   # longer

Workers are started before the clock is.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from joblib import Parallel, delayed
from segmentation_models_pytorch import Unet
from torch import Tensor, nn

from lightning_prune.data import BrainSlices
from lightning_prune.netadapt.rounds import Rounds, SearchResult
from lightning_prune.netadapt.run import search
from lightning_prune.netadapt.workers import Workers
from lightning_prune.pruning.training import Training
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.policy import PruningPolicy

STEPS, BLOCKS, PER_ROUND = 10, 10, 0.05


def loss(net: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def judged(net: nn.Module, batches: list[Any]) -> float:
    return sum(loss(net, batch).item() for batch in batches)


def found(workers: int, rounds: int) -> tuple[nn.Module, SearchResult, float]:
    """The network and the facts of a search, and its seconds."""
    torch.manual_seed(0)
    net = Unet("resnet18", encoder_weights=None, in_channels=1, classes=3)
    data = BrainSlices(size=64)
    held_out = list(data.val_dataloader())
    training = Training(
        list(data.train_dataloader()), loss, partial(judged, batches=held_out), higher_is_better=False
    )
    plan = Rounds(rounds=rounds, decay=1.0, steps=STEPS, blocks=BLOCKS)
    rules = PruningPolicy({"macs": 1 - PER_ROUND * rounds}, limits=Limits(0.85))
    start = time.perf_counter()
    result = search(net, torch.zeros(1, 1, 64, 64), rules, training, plan, Workers(workers))
    return net, result, time.perf_counter() - start


def main() -> None:
    """Search twice, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    Parallel(n_jobs=2)(delayed(Workers)() for _ in range(4))  # starts the processes, and has them import
    one, first, alone = found(1, given.rounds)
    two, second, together = found(2, given.rounds)
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs) and first.record == second.record
    print(f"same bits: {'yes' if same else 'NO'}; {first.steps} steps of candidates")
    print(f"one worker {alone:.1f} s, two {together:.1f} s: {together / alone:.2f} of the time")
    raise SystemExit(0 if same else "two workers ended differently")


if __name__ == "__main__":
    main()
