"""Seconds of 20 cuts in one training of a U-Net, beyond the criterion.

    python -m benchmarks.speed.cuts             # adds them to docs/results/data/speed.json

The cuts are those of a pruning callback: scores (left out), plan, surgery, proof, trace of the smaller network.
``python -m benchmarks.speed --report`` writes the page.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn

from benchmarks.common.pages import ReportFiles, docs_parser
from benchmarks.zoo.ours import warm_up
from lightning_prune import IPAD, trace
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.policy import PruningPolicy

CUTS, LAST = 20, 0.3


class Scored:
    """A criterion that measures the processor time of its scores."""

    def __init__(self) -> None:
        self.criterion, self.seconds = IPAD(omega=1.0), 0.0

    def __call__(self, *args: Any) -> Any:
        """Return the importance of all units."""
        start = time.process_time()
        try:
            return self.criterion(*args)
        finally:
            self.seconds += time.process_time() - start


def cuts() -> list[float]:
    """Return the seconds of each of the cuts, down to ``LAST`` of the MACs."""
    net = smp.Unet("resnet34", encoder_weights=None, in_channels=1, classes=3)
    example = torch.zeros(1, 1, 128, 128)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    _step(net, optimizer)
    graph = trace(net, example)
    session = PruningSession(net, ((example,), {}), graph, DenseSizes.of(graph))
    seconds = []
    for number in range(1, CUTS + 1):
        criterion, policy = Scored(), PruningPolicy({"macs": 1 - (1 - LAST) * number / CUTS})
        gc.collect()
        start = time.process_time()
        assert session.cut_(policy, criterion, [optimizer])
        seconds.append(time.process_time() - start - criterion.seconds)
        _step(net, optimizer)
    return seconds


def _step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    net(torch.randn(2, 1, 128, 128)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and store the seconds."""
    args = docs_parser("speed.cuts", __doc__).parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    warm_up()
    files = ReportFiles("speed", args.docs)
    seconds = cuts()
    print(" ".join(f"{each:.3f}" for each in seconds))
    files.save({**files.load(), "cuts": seconds})


if __name__ == "__main__":
    main()
