"""Cost of pruning during a training: collecting statistics, cutting with proof, memory.

    python -m benchmarks.speed.overhead             # writes docs/results/overhead.md and data/overhead.json
    python -m benchmarks.speed.overhead --report    # only writes the page again, from the JSON

Lightning trains ``smp.Unet(resnet34)`` on random images. Epochs with and without statistics alternate in one run
(without, with, with, without, ...), so that other load on the machine affects both alike. Each pair of neighbours
gives one ratio; the page has the median of the ratios and their quartiles. The criterion is IPAD with both terms,
which needs statistics of every layer. A cut takes a tenth of the MACs, each time from a new network: scores,
selection, surgery, proof, and tracing of the smaller network.
"""

from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

import lightning as L
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.machine import machine, versions
from benchmarks.common.memory import peak_memory
from benchmarks.common.pages import ReportFiles, page_parser
from lightning_prune import IPAD, trace
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.policy import PruningPolicy

GOALS = {"statistics": 0.05, "cut": 2.0}
MEMORY_EPOCHS = 2


@dataclass(frozen=True)
class Setting:
    """Size of the images and of the batches, and the number of batches, pairs of epochs, cuts and threads."""

    size: int = 128
    batch: int = 8
    batches: int = 8
    pairs: int = 8
    cuts: int = 5
    threads: int = 1


@dataclass
class Time:
    """Seconds by the wall clock and of the processor."""

    wall: float = 0.0
    cpu: float = 0.0


@contextlib.contextmanager
def timed() -> Iterator[Time]:
    """Measure the time of the block."""
    seconds, wall, cpu = Time(), time.perf_counter(), time.process_time()
    yield seconds
    seconds.wall, seconds.cpu = time.perf_counter() - wall, time.process_time() - cpu


class Segmenter(L.LightningModule):
    """U-Net with a cross-entropy loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = smp.Unet("resnet34", encoder_weights=None, in_channels=1, classes=3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 3, h, w) of images (n, 1, h, w)."""
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return a fused AdamW."""
        return torch.optim.AdamW(self.parameters(), 1e-3, fused=True)


@dataclass
class Epochs(L.Callback):
    """Collects statistics in some epochs, as the pruning callback does, and measures every epoch.

    Args:
        run: the session that collects.
        gathers: whether to collect, for each epoch.
        measured_memory: number of epochs, at the end, of which the peak memory is measured.
    """

    run: PruningSession
    gathers: Sequence[bool]
    measured_memory: int
    times: list[Time] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the measurement, and collecting."""
        self.stack = contextlib.ExitStack()
        if trainer.current_epoch >= len(self.gathers) - self.measured_memory:
            self.peak = self.stack.enter_context(peak_memory())
        self.time = self.stack.enter_context(timed())
        if self.gathers[trainer.current_epoch]:
            self.run.observe(IPAD(omega=0.5))

    def on_train_batch_start(self, *args: Any) -> None:
        """Enable collection."""
        self.run.set_observing(True)

    def on_train_batch_end(self, *args: Any) -> None:
        """Disable collection outside of training batches."""
        self.run.set_observing(False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reduce the statistics and end the measurement."""
        if self.run.observer is not None:
            self.run.observer.compute()
            self.run.stop_observing()
        self.stack.close()
        self.times.append(self.time)
        if hasattr(self, "peak"):
            self.peaks.append(self.peak.megabytes)


def prepare(module: nn.Module, size: int) -> PruningSession:
    """Trace the network and return its pruning session."""
    example = ((torch.zeros(1, 1, size, size),), {})
    graph = trace(module, *example[0])
    return PruningSession(module, example, graph, DenseSizes.of(graph))


def epochs(setting: Setting) -> Epochs:
    """Train with statistics in every other epoch; the first epoch warms up, the last two measure memory."""
    module = Segmenter()
    order = [False, True, True, False] * ((setting.pairs + 1) // 2)
    gathers = [False, *order[: 2 * setting.pairs], False, True]
    callback = Epochs(prepare(module, setting.size), gathers, MEMORY_EPOCHS)
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
    """Return the time of each cut, and the peak memory of one more."""
    measured = []
    for number in range(setting.cuts + 1):
        module = Segmenter()
        optimizer = module.configure_optimizers()
        module(torch.zeros(2, 1, setting.size, setting.size)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        session, policy = prepare(module, setting.size), PruningPolicy({"macs": 0.9})
        with peak_memory() if number == setting.cuts else timed() as measurement:
            assert session.cut_(policy, IPAD(omega=1.0), [optimizer])
        measured.append(measurement)
    *times, peak = measured
    return times, peak.megabytes


def ratios(values: Sequence[float]) -> list[float]:
    """Return with statistics over without, for each pair; the order within pairs alternates.

    Example:
        >>> ratios([1.0, 2.0, 6.0, 3.0])
        [2.0, 2.0]
    """
    pairs = [values[n : n + 2] for n in range(0, len(values), 2)]
    return [pair[1] / pair[0] if n % 2 == 0 else pair[0] / pair[1] for n, pair in enumerate(pairs)]


def measure(setting: Setting) -> dict[str, Any]:
    """Measure epochs and cuts; return the values of the JSON for both clocks, and the peaks of memory."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    training = epochs(setting)
    cut_times, cut_peak = cuts(setting)
    peaks = {"epoch": training.peaks[0], "statistics": training.peaks[1], "cut": cut_peak}
    clocks = {clock: summary(clock, training, cut_times, setting.batches) for clock in ("wall", "cpu")}
    return {"peak_mb": peaks, **clocks}


def summary(clock: str, training: Epochs, cut_times: Sequence[Time], batches: int) -> dict[str, Any]:
    """Return medians and ratios by one clock, ``wall`` or ``cpu``."""
    paired = [getattr(time, clock) for time in training.times[1:-MEMORY_EPOCHS]]
    epoch = median(t for t, gathers in zip(paired, training.gathers[1:], strict=False) if not gathers)
    cut = median(getattr(time, clock) for time in cut_times)
    overhead = ratios(paired)
    return {
        "epoch": epoch,
        "statistics": median(overhead) - 1,
        "statistics_quartiles": [q - 1 for q in quantiles(overhead, n=4)[::2]],
        "cut": cut,
        "cut_in_batches": cut / (epoch / batches),
        "cut_share_of_epoch": cut / epoch,
    }


ROWS = (
    ("seconds of an epoch", "epoch", ".2f"),
    ("statistics, share of an epoch", "statistics", ".1%"),
    ("one cut with its proof, seconds", "cut", ".2f"),
    ("… in training batches", "cut_in_batches", ".1f"),
    ("… as a share of this (short) epoch", "cut_share_of_epoch", ".0%"),
)


def page(content: dict[str, Any]) -> str:
    """Return the page (Markdown) of the stored numbers."""
    wall, cpu, peak, setting = content["wall"], content["cpu"], content["peak_mb"], content["setting"]
    low, high = wall["statistics_quartiles"]
    lines = [
        "# Overhead",
        "",
        f"{content['date']} · torch {content['versions']['torch']} · {content['machine']}, "
        f"{setting['threads']} thread(s). Made by `python -m benchmarks.speed.overhead`.",
        "",
        f"- **Collecting statistics makes an epoch {wall['statistics']:.1%} longer** (quartiles {low:.1%} to "
        f"{high:.1%} over {setting['pairs']} pairs of epochs; goal: under {GOALS['statistics']:.0%}).",
        f"- **A cut takes {wall['cut']:.2f} s** with its proof (goal: under {GOALS['cut']:.0f} s).",
        f"- Peak memory beyond the memory before: {peak['epoch']:.0f} MB in an epoch without statistics, "
        f"{peak['statistics']:.0f} MB in an epoch with statistics, {peak['cut']:.0f} MB in a cut.",
        "",
        f"`smp.Unet(resnet34)`, {setting['batch'] * setting['batches']} images of {setting['size']} x "
        f"{setting['size']} per epoch, in batches of {setting['batch']}. Medians; those of cuts are over "
        f"{setting['cuts']} cuts.",
        "",
        "| | wall clock | processor time |",
        "|:--|--:|--:|",
        *(f"| {name} | {wall[key]:{form}} | {cpu[key]:{form}} |" for name, key, form in ROWS),
    ]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = page_parser("speed.overhead", __doc__)
    for name, default in asdict(Setting()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write both files, and print the page."""
    args = parse(arguments)
    files = ReportFiles("overhead", args.docs)
    if not args.report:
        setting = Setting(**{name: getattr(args, name) for name in asdict(Setting())})
        date, kind = time.strftime("%Y-%m-%d %H:%M"), machine().removesuffix(", one thread")
        head = {"date": date, "versions": versions(), "machine": kind, "setting": asdict(setting)}
        files.save({**head, **measure(setting)})
    text = page(files.load())
    files.write_page(text)
    print(text)


if __name__ == "__main__":
    main()
