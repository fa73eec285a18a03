"""Time and memory of a whole training that shrinks, against the dense training with the same steps.

    python -m benchmarks.speed.training             # writes docs/results/training_cost.md and data/training_cost.json
    python -m benchmarks.speed.training --report    # only writes the page again, from the JSON

Every training is a process of its own: dense, to half of the MACs, to 26 %, and again, so that other load on the
machine affects all alike. Each pruned training gives a ratio to the dense one of its turn; the page has the medians.
``FilterPruningCallback`` cuts at the end of the first two epochs and repairs each cut; collecting statistics, cuts,
proofs and repairs are part of the time. Memory is the resident memory beyond that before the first epoch:
activations, gradients, the state of the optimizer and all that cuts and repairs need, but not libraries, data and the
first weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import product
from statistics import median
from typing import Any

import lightning as L
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from benchmarks.common.machine import machine, versions
from benchmarks.common.memory import peak_memory
from benchmarks.common.pages import ReportFiles, page_parser
from lightning_prune import FilterPruningCallback, Limits
from lightning_prune.data import BrainSlices

NAME, CUTS = "training_cost", 2
DENSE, SHARES = 1.0, (1.0, 0.5, 0.26)


@dataclass(frozen=True)
class Setting:
    """Number of epochs, of batches per epoch, of images in a batch, and of turns."""

    epochs: int = 8
    batches: int = 8
    batch: int = 8
    turns: int = 3


class Learner(L.LightningModule):
    """Trains a network with the cross-entropy and Adam.

    Args:
        net: returns logits.
        example: a batch of one image.
    """

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.net, self.example_input_array = net, example

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 1e-3)


def unet(setting: Setting) -> tuple[nn.Module, TensorDataset]:
    """Return the U-Net that ``conf/`` trains by default, and slices of a brain at 96 x 96."""
    data = BrainSlices(size=96, batch_size=setting.batch)
    data.setup("fit")
    batches = list(data.train_dataloader())
    images, masks = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    net = smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=3)
    return net, _first(images, masks, setting)


def resnet(setting: Setting) -> tuple[nn.Module, TensorDataset]:
    """Return torchvision's ResNet-18 with ten classes, and random images at 64 x 64, as only costs are measured."""
    number = setting.batch * setting.batches
    return resnet18(num_classes=10), _first(
        torch.rand(number, 3, 64, 64), torch.randint(10, (number,)), setting
    )


def _first(images: Tensor, labels: Tensor, setting: Setting) -> TensorDataset:
    number = setting.batch * setting.batches
    return TensorDataset(images[:number], labels[:number])


NETWORKS: dict[str, tuple[str, Callable[[Setting], tuple[nn.Module, TensorDataset]]]] = {
    "unet": ("`smp.Unet(resnet18)`, BrainSlices, 96 x 96", unet),
    "resnet": ("`torchvision` ResNet-18, 64 x 64", resnet),
}


@dataclass
class MemoryOfEpochs(L.Callback):
    """Measures the peak of resident memory in every epoch with all that other callbacks do at its end.

    Attributes:
        peaks: megabytes beyond the memory before training.
    """

    start: float = 0.0
    peaks: list[float] = field(default_factory=list)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the measurement."""
        self.stack = ExitStack()
        self.peak = self.stack.enter_context(peak_memory())
        self.start = self.start or self.peak.before

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the measurement."""
        self.stack.close()
        self.peaks.append(self.peak.before + self.peak.megabytes - self.start)


def run(network: str, share: float, setting: Setting) -> dict[str, Any]:
    """Train once in this process; return seconds, peaks of memory and the share of MACs that is left."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, data = NETWORKS[network][1](setting)
    module, memory = Learner(net, data[0][0][None]), MemoryOfEpochs()
    pruning = FilterPruningCallback(
        {"macs": share},
        amount={"macs": (1 - share) / CUTS},
        start_epoch=0,
        optimizer="carry",
        submodule="net",
        verbose=False,
        limits=Limits(0.9),
    )
    # Lightning calls callbacks in this order: memory is read after the cut.
    callbacks = [memory] if share == DENSE else [pruning, memory]
    trainer = L.Trainer(
        max_epochs=setting.epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.fit(module, DataLoader(data, setting.batch, shuffle=True))
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    cuts = [] if share == DENSE else pruning.history
    return {
        "network": network,
        "share": share,
        **seconds,
        "cut_seconds": sum(cut.seconds for cut in cuts),
        "repaired": sum(cut.change is not None and not cut.not_repaired for cut in cuts),
        "cuts": len(cuts),
        "macs": cuts[-1].share["macs"] if cuts else 1.0,
        "peaks_mb": memory.peaks,
    }


def measure(setting: Setting) -> list[dict[str, Any]]:
    """Train every network to every share in turns, each in a process of its own, and return the runs."""
    runs = []
    for turn, network, share in product(range(setting.turns), NETWORKS, SHARES):
        command = [sys.executable, "-m", "benchmarks.speed.training", "--run", network, str(share)]
        options = [text for name, value in asdict(setting).items() for text in (f"--{name}", str(value))]
        out = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if out.returncode:
            raise RuntimeError(f"{network} to {share:.0%} failed: {out.stderr[-2000:]}")
        runs.append({"turn": turn, **json.loads(out.stdout.splitlines()[-1])})
        print(f"turn {turn}: {network} to {share:.0%}: {runs[-1]['cpu']:.1f} s of processor time", flush=True)
    return runs


def ratio(runs: Sequence[dict[str, Any]], share: float, value: Callable[[dict[str, Any]], float]) -> float:
    """Return the median over turns of a value of the training to ``share``, divided by the dense one's of its turn.

    Example:
        >>> runs = [{"turn": 0, "share": 1.0, "cpu": 4.0}, {"turn": 0, "share": 0.5, "cpu": 3.0}]
        >>> ratio(runs, 0.5, lambda run: run["cpu"])
        0.75
    """
    dense = {run["turn"]: value(run) for run in runs if run["share"] == DENSE}
    return median(value(run) / dense[run["turn"]] for run in runs if run["share"] == share)


def last_peak(run: dict[str, Any]) -> float:
    """Return the peak of memory in the last epoch."""
    return float(run["peaks_mb"][-1])


def _row(label: str, runs: Sequence[dict[str, Any]], share: float) -> str:
    of_share = [run for run in runs if run["share"] == share]
    cells = [
        label,
        f"{median(run['macs'] for run in of_share):.0%}",
        *(
            f"{median(run[clock] for run in of_share):.1f} s ({ratio(runs, share, lambda run, c=clock: run[c]):.0%})"
            for clock in ("wall", "cpu")
        ),
        f"{median(run['cut_seconds'] for run in of_share):.1f} s",
        *(
            f"{median(map(peak, of_share)):.0f} MB ({ratio(runs, share, peak):.0%})"
            for peak in (lambda run: max(run["peaks_mb"]), last_peak)
        ),
    ]
    return f"| {' | '.join(cells)} |"


def page(content: dict[str, Any]) -> str:
    """Return the page (Markdown) of the stored numbers."""
    setting, runs = content["setting"], content["runs"]
    rows = [
        _row(label if share == DENSE else "", [run for run in runs if run["network"] == name], share)
        for name, (label, _) in NETWORKS.items()
        for share in SHARES
    ]
    steps = setting["epochs"] * setting["batches"]
    taken = (
        "One turn; in brackets the ratio to its dense training."
        if setting["turns"] == 1
        else f"Medians of {setting['turns']} turns; in brackets the median of the ratios to the dense training of "
        "the same turn."
    )
    lines = [
        "# Cost of a whole training",
        "",
        f"{content['date']} · torch {content['versions']['torch']} · {content['machine']}. Made by "
        "`python -m benchmarks.speed.training`.",
        "",
        f"Every training has {steps} steps ({setting['epochs']} epochs) with batches of {setting['batch']}. The "
        f"pruned ones reach their MACs in {CUTS} cuts, at the end of the first {CUTS} epochs; each cut is repaired. "
        f"Statistics, cuts, proofs and repairs are part of the time. {taken}",
        "",
        "| network | MACs at the end | wall clock | processor time | cuts (wall) | peak memory | in the last epoch |",
        "|:--|--:|--:|--:|--:|--:|--:|",
        *rows,
        "",
        "- Other programs ran on the machine: the processor time is the more reliable clock.",
        "- Memory is resident memory beyond that before the first epoch, without libraries, data and weights.",
        "- The peak of a whole training is that of its first epochs, when the network is dense, or is repaired. "
        "The last epoch shows what the smaller network needs.",
        f"- {CUTS} cuts cost the same, whatever follows: in a longer training their share of the time is smaller.",
    ]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = page_parser("speed.training", __doc__)
    for name, default in asdict(Setting()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--run", nargs=2, metavar=("NETWORK", "SHARE"), help="train once and print the numbers"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write both files, and print the page."""
    args = parse(arguments)
    setting = Setting(**{name: getattr(args, name) for name in asdict(Setting())})
    if args.run:
        print(json.dumps(run(args.run[0], float(args.run[1]), setting)))
        return
    files = ReportFiles(NAME, args.docs)
    if not args.report:
        head = {"date": time.strftime("%Y-%m-%d %H:%M"), "versions": versions(), "machine": machine()}
        files.save({**head, "setting": asdict(setting), "runs": measure(setting)})
    text = page(files.load())
    files.write_page(text)
    print(text)


if __name__ == "__main__":
    main()
