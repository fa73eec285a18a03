"""What pruning costs while training: gathering statistics, cutting with proof, memory.

    python -m benchmarks.speed.overhead

``smp.Unet(resnet34)`` is trained by Lightning on random images. Epochs with and without statistics alternate in one
run (without, with, with, without, ...), so that whatever else the machine does falls on both; the ratio of each
neighbouring pair is taken, and the median of the ratios reported, with their quartiles. The criterion is IPAD with
both terms, which wants statistics of every layer. Cuts take a tenth of the MACs, each from a fresh network: scores,
selection, surgery, proof, and the trace of what is left. Writes ``overhead.json`` and ``overhead.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning as L
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.machine import machine, versions
from benchmarks.common.memory import peak_memory
from lightning_prune import IPAD, trace
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.policy import PruningPolicy

GOALS = {"statistics": 0.05, "cut": 2.0}
MEMORY_EPOCHS = 2


@dataclass(frozen=True)
class Setting:
    """What is trained, and how much of it."""

    size: int = 128
    batch: int = 8
    batches: int = 8
    pairs: int = 8
    cuts: int = 5
    threads: int = 1


@dataclass
class Time:
    """Seconds that something took: of the clock, and of the processor."""

    wall: float = 0.0
    cpu: float = 0.0


@contextlib.contextmanager
def timed() -> Iterator[Time]:
    """Measure the block."""
    found, wall, cpu = Time(), time.perf_counter(), time.process_time()
    yield found
    found.wall, found.cpu = time.perf_counter() - wall, time.process_time() - cpu


class Segmenter(L.LightningModule):
    """The network and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = smp.Unet("resnet34", encoder_weights=None, in_channels=1, classes=3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, fused."""
        return torch.optim.AdamW(self.parameters(), 1e-3, fused=True)


@dataclass
class Epochs(L.Callback):
    """Gathers statistics in the epochs it is told to, as the pruning callback does, and measures every epoch."""

    run: PruningSession
    gathers: Sequence[bool]
    measured_memory: int
    times: list[Time] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to measure, and to gather."""
        self.stack = contextlib.ExitStack()
        if trainer.current_epoch >= len(self.gathers) - self.measured_memory:
            self.peak = self.stack.enter_context(peak_memory())
        self.time = self.stack.enter_context(timed())
        if self.gathers[trainer.current_epoch]:
            self.run.collect(IPAD(omega=0.5))

    def on_train_batch_start(self, *args: Any) -> None:
        """This forward counts."""
        self.run.watch(True)

    def on_train_batch_end(self, *args: Any) -> None:
        """What follows does not."""
        self.run.watch(False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reduce what was gathered; stop measuring."""
        if self.run.collector is not None:
            self.run.collector.compute()
            self.run.forget()
        self.stack.close()
        self.times.append(self.time)
        if hasattr(self, "peak"):
            self.peaks.append(self.peak.megabytes)


def prepared(module: nn.Module, size: int) -> PruningSession:
    """The traced network."""
    example = ((torch.zeros(1, 1, size, size),), {})
    graph = trace(module, *example[0])
    return PruningSession(module, example, graph, DenseSizes.of(graph))


def epochs(setting: Setting) -> Epochs:
    """Train with statistics in every other epoch; the first epoch warms up, the last two are for memory."""
    module = Segmenter()
    order = [False, True, True, False] * ((setting.pairs + 1) // 2)
    gathers = [False, *order[: 2 * setting.pairs], False, True]
    callback = Epochs(prepared(module, setting.size), gathers, MEMORY_EPOCHS)
    number = setting.batch * setting.batches
    images = torch.randn(number, 1, setting.size, setting.size)
    masks = torch.randint(3, (number, setting.size, setting.size))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=len(gathers), accelerator="cpu", callbacks=[callback], enable_model_summary=False, **quiet
    )
    trainer.fit(module, DataLoader(TensorDataset(images, masks), setting.batch))
    return callback


def cuts(setting: Setting) -> tuple[list[Time], float]:
    """Time of each cut, and the peak of memory in one of them."""
    times = []
    for number in range(setting.cuts + 1):
        module = Segmenter()
        optimizer = module.configure_optimizers()
        module(torch.zeros(2, 1, setting.size, setting.size)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        run, rules = prepared(module, setting.size), PruningPolicy({"macs": 0.9})
        with peak_memory() if number == setting.cuts else timed() as found:
            assert run.cut_(rules, IPAD(omega=1.0), [optimizer])
        times.append(found)
    peak = times.pop()
    return times, peak.megabytes


def ratios(values: Sequence[float]) -> list[float]:
    """With statistics over without, for each pair; the order within pairs alternates.

    Example:
        >>> ratios([1.0, 2.0, 6.0, 3.0])
        [2.0, 2.0]
    """
    pairs = [values[n : n + 2] for n in range(0, len(values), 2)]
    return [pair[1] / pair[0] if n % 2 == 0 else pair[0] / pair[1] for n, pair in enumerate(pairs)]


def measure(setting: Setting) -> dict[str, Any]:
    """Everything."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    trained = epochs(setting)
    cut_times, cut_peak = cuts(setting)
    paired = trained.times[1:-MEMORY_EPOCHS]
    without = [t for t, gathers in zip(paired, trained.gathers[1:], strict=False) if not gathers]
    found: dict[str, Any] = {
        "peak_mb": {"epoch": trained.peaks[0], "statistics": trained.peaks[1], "cut": cut_peak}
    }
    for clock in ("wall", "cpu"):
        epoch = median(getattr(t, clock) for t in without)
        cut = median(getattr(t, clock) for t in cut_times)
        overhead = ratios([getattr(t, clock) for t in paired])
        found[clock] = {
            "epoch": epoch,
            "statistics": median(overhead) - 1,
            "statistics_quartiles": [q - 1 for q in quantiles(overhead, n=4)[::2]],
            "cut": cut,
            "cut_in_batches": cut / (epoch / setting.batches),
            "cut_share_of_epoch": cut / epoch,
        }
    return found


def page(found: dict[str, Any], setting: Setting, head: dict[str, Any]) -> str:
    """The result as Markdown."""
    wall, peak = found["wall"], found["peak_mb"]
    images = setting.batch * setting.batches
    rows = [("seconds of an epoch", "epoch", ".2f"), ("statistics, share of an epoch", "statistics", ".1%")]
    rows += [
        ("one cut with its proof, seconds", "cut", ".2f"),
        ("… in training batches", "cut_in_batches", ".1f"),
    ]
    rows += [("… as a share of this (short) epoch", "cut_share_of_epoch", ".0%")]
    low, high = wall["statistics_quartiles"]
    lines = [
        "# Overhead",
        "",
        f"{head['date']} · torch {head['versions']['torch']} · {head['machine']}, {setting.threads} thread(s). "
        "Made by `python -m benchmarks.speed.overhead`.",
        "",
        f"- **Gathering statistics makes an epoch {wall['statistics']:.1%} longer** (quartiles {low:.1%} to "
        f"{high:.1%} over {setting.pairs} pairs; wanted: under {GOALS['statistics']:.0%}).",
        f"- **A cut takes {wall['cut']:.2f} s**, proof included (wanted: under {GOALS['cut']:.0f} s).",
        f"- Peak memory beyond what was held before: {peak['epoch']:.0f} MB in an epoch without statistics, "
        f"{peak['statistics']:.0f} MB in one with, {peak['cut']:.0f} MB in a cut.",
        "",
        f"`smp.Unet(resnet34)`, {images} images of {setting.size} x {setting.size} per epoch, in batches of "
        f"{setting.batch}; medians, of {setting.cuts} for cuts.",
        "",
        "| | by the clock | of the processor |",
        "|:--|--:|--:|",
        *(f"| {name} | {wall[key]:{form}} | {found['cpu'][key]:{form}} |" for name, key, form in rows),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write both files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.overhead", description=__doc__.splitlines()[0]
    )
    for name, default in asdict(Setting()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[2] / "docs")
    asked = vars(parser.parse_args(arguments))
    docs = asked.pop("docs")
    setting = Setting(**asked)
    found = measure(setting)
    kind = machine().removesuffix(", one thread")
    head = {"date": time.strftime("%Y-%m-%d %H:%M"), "versions": versions(), "machine": kind}
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "overhead.json").write_text(json.dumps({**head, "setting": asked, **found}, indent=1) + "\n")
    (docs / "overhead.md").write_text(text := page(found, setting, head))
    print(text)


if __name__ == "__main__":
    main()
