"""The same NetAdapt search with one worker and with two: equal bits, and the ratio of the times.

    python -m benchmarks.methods.netadapt              # one round of a U-Net on brain slices; minutes
    python -m benchmarks.methods.netadapt --rounds 2   # longer

The time to start the workers is left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
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


def total_loss(net: nn.Module, batches: list[Any]) -> float:
    return sum(loss(net, batch).item() for batch in batches)


def timed_search(workers: int, rounds: int) -> tuple[nn.Module, SearchResult, float]:
    """Return the pruned network, the result of the search, and its seconds."""
    torch.manual_seed(0)
    net = Unet("resnet18", encoder_weights=None, in_channels=1, classes=3)
    data = BrainSlices(size=64)
    score = partial(total_loss, batches=list(data.val_dataloader()))
    training = Training(list(data.train_dataloader()), loss, score, higher_is_better=False)
    schedule = Rounds(rounds=rounds, decay=1.0, steps=STEPS, blocks=BLOCKS)
    policy = PruningPolicy({"macs": 1 - PER_ROUND * rounds}, limits=Limits(0.85))
    start = time.perf_counter()
    result = search(net, torch.zeros(1, 1, 64, 64), policy, training, schedule, Workers(workers))
    return net, result, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Search twice, compare, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods.netadapt", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    Parallel(n_jobs=2)(delayed(Workers)() for _ in range(4))  # starts the processes and loads their imports
    single_net, single, single_seconds = timed_search(1, args.rounds)
    double_net, double, double_seconds = timed_search(2, args.rounds)
    pairs = zip(single_net.state_dict().values(), double_net.state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs) and single.record == double.record
    print(f"same bits: {'yes' if same else 'NO'}; {single.steps} training steps of candidates")
    ratio = double_seconds / single_seconds
    print(f"one worker {single_seconds:.1f} s, two {double_seconds:.1f} s: {ratio:.2f} of the time")
    raise SystemExit(0 if same else "one worker and two workers gave different networks")


if __name__ == "__main__":
    main()
