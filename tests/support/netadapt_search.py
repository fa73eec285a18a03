"""A small search for tests, also run in other processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.netadapt.rounds import Rounds, SearchResult
from lightning_prune.netadapt.run import search
from lightning_prune.netadapt.workers import Workers
from lightning_prune.pruning.training import Training
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.policy import PruningPolicy

RULES = PruningPolicy({"macs": 0.5}, limits=Limits(0.9))
THREE = Rounds(rounds=3, steps=2)


def build() -> nn.Sequential:
    """Return a network of three convolutions that can be pruned, with norms and dropout."""
    torch.manual_seed(0)
    widths, layers = [1, 8, 12, 8], []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Conv2d(8, 1, 1))


def batches(number: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of noise and blurred noise, shape (4, 1, 8, 8) each."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(number, 4, 1, 8, 8, generator=generator)
    return [(image, F.avg_pool2d(image, 3, 1, 1)) for image in images]


def loss(net: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(net(batch[0]), batch[1])


def error(net: nn.Module, held_out: list[Any]) -> float:
    return sum(loss(net, batch).item() for batch in held_out) / len(held_out)


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=1e-2)


TRAINING = Training(batches(5, 1), loss, partial(error, held_out=batches(2, 2)), adam, higher_is_better=False)


def silent(line: str) -> None:
    """Discard a line."""


def run_search(
    training: Training = TRAINING,
    workers: Workers = Workers(),  # noqa: B008
    rounds: Rounds = THREE,
    rules: PruningPolicy = RULES,
    folder: Path | None = None,
    report: Callable[[str], None] = silent,
    **kwargs: Any,
) -> tuple[nn.Module, SearchResult]:
    """Run a search on a new network; return the network and the result."""
    net = build()
    example = torch.zeros(1, 1, 8, 8)
    return net, search(net, example, rules, training, rounds, workers, folder=folder, report=report, **kwargs)


def kill_after_second_round(line: str) -> None:
    """Kill this process when the second round has been saved."""
    if line.startswith("round 2"):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run_search(folder=Path(sys.argv[1]), report=kill_after_second_round)
