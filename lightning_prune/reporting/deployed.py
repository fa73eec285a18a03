"""Networks in ONNX, as they are deployed: size of the file, latency in ONNX Runtime, score on the test set."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.latency.timing import sample_times
from lightning_prune.reporting.comparison import share, threads_or_device
from lightning_prune.reporting.final_scores import scores_of_test
from lightning_prune.serialization.quantization import open_session
from lightning_prune.utils.metrics import SCORE_LABELS
from lightning_prune.utils.tables import NOTHING, Table

__all__ = ["Deployed", "OnnxNetwork", "deployed_table", "measured", "test_scores"]

WARM_UP = 5


@dataclass(frozen=True)
class Deployed:
    """A network in ONNX.

    Attributes:
        bytes: size of the file.
        latency_ms: median milliseconds of one image.
        scores: metric -> value on the test set; empty if it was not tested.
    """

    bytes: int
    latency_ms: float
    scores: dict[str, float] = field(default_factory=dict)


class OnnxNetwork(nn.Module):
    """A network in an ONNX file, run by ONNX Runtime on the CPU; it has no parameters.

    Args:
        path: the file, with one input whose first dimension is the batch.
        threads: of one run; 0: as ONNX Runtime chooses.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        super().__init__()
        self.session = open_session(path, threads)
        self.input = self.session.get_inputs()[0]

    def forward(self, image: Tensor) -> Tensor:
        """Return the first output for a batch of images, also if the file has a fixed batch."""
        size = self.input.shape[0] if isinstance(self.input.shape[0], int) else len(image)
        parts = [self._run(image[start : start + size], size) for start in range(0, len(image), size)]
        return torch.cat(parts).to(image.device)

    def _run(self, image: Tensor, size: int) -> Tensor:
        missing = size - len(image)
        padded = torch.cat([image, image[-1:].expand(missing, *image.shape[1:])]) if missing else image
        output = self.session.run(None, {self.input.name: np.ascontiguousarray(padded.cpu().numpy())})[0]
        return torch.from_numpy(output)[: len(image)]


def measured(paths: Mapping[str, Path], shape: Sequence[int], threads: int, runs: int) -> dict[str, Deployed]:
    """Measure the files and their latency for one image; the networks take turns, so that noise hits all alike.

    Args:
        paths: name -> file.
        shape: of the input; its batch is taken as 1 where the file allows it.
        threads: of ONNX Runtime.
        runs: measured runs of each network, after five that are not measured.
    """
    networks = [OnnxNetwork(path, threads) for path in paths.values()]
    image = torch.rand((1, *shape[1:]), generator=torch.Generator().manual_seed(0))
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    with torch.inference_mode():
        calls = [partial(network, image) for network in networks]
        samples = sample_times(calls, torch.device("cpu"), clock, WARM_UP + runs)
    return {
        name: Deployed(path.stat().st_size, statistics.median(times[WARM_UP:]) / 1e6)
        for (name, path), times in zip(paths.items(), samples, strict=True)
    }


def test_scores(module: L.LightningModule, data: L.LightningDataModule, path: Path) -> dict[str, float]:
    """Return the test metrics of a network in ONNX, by the module that has trained it; {} without a test set.

    Args:
        module: its network, the attribute ``net``, is replaced.
        data: its test set is used.
        path: file of the network.
    """
    module.net = OnnxNetwork(path)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return scores_of_test(trainer, module, data)


test_scores.__test__ = False  # type: ignore[attr-defined] # pytest takes it for a test


def deployed_table(networks: Mapping[str, Deployed], threads: int) -> Table:
    """Return a table with a column per network; the first one is what the others are compared with.

    Example:
        >>> networks = {"dense": Deployed(4_000_000, 2.0), "pruned INT8": Deployed(500_000, 0.5, {"miou": 0.9})}
        >>> for row in deployed_table(networks, threads=1).rows:
        ...     print(row)
        ('ONNX file', '4.00 MB', '0.50 MB')
        ('of dense', '100.0 %', '12.5 %')
        ('latency, 1 thread', '2.00 ms', '0.50 ms')
        ('of dense', '100.0 %', '25.0 %')
        ('test mIoU', '-', '0.9000')
    """
    all_networks = list(networks.values())
    first, name = all_networks[0], f"of {next(iter(networks))}"
    where = threads_or_device(threads, "cpu")
    rows = [
        ("ONNX file", *(f"{each.bytes / 1e6:.2f} MB" for each in all_networks)),
        (name, *(share(each.bytes, first.bytes) for each in all_networks)),
        (f"latency, {where}", *(f"{each.latency_ms:.2f} ms" for each in all_networks)),
        (name, *(share(each.latency_ms, first.latency_ms) for each in all_networks)),
    ]
    for metric, label in SCORE_LABELS.items():
        if any(metric in each.scores for each in all_networks):
            rows.append((f"test {label}", *(_score(each.scores.get(metric)) for each in all_networks)))
    return Table(("", *networks), rows)


def _score(value: Any) -> str:
    return NOTHING if value is None else f"{value:.4f}"
