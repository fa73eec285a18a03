"""Is it better to carry the optimizer's state over a cut, or to begin with a new one, with and without warm-up?

``python -m benchmarks.quality.optimizer``: from each dense network of the study, ``FilterPruningCallback`` makes
three cuts to 26 % of the MACs while Adam trains. The learning rate falls to zero over the whole run, by the same
curve in all variants, so that only the state of the optimizer and the warm-up differ. All variants of a seed begin
with the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.quality.networks import Uniform
from benchmarks.quality.tasks import FOLDER, Task, dense, make_task, score
from lightning_prune import FilterPruningCallback, Linear
from lightning_prune.criteria import L2

__all__ = ["VARIANTS", "differences", "run"]

CUTS, BUDGET, RATE = 3, {"macs": 0.26}, 1e-3
#: name -> mode of the optimizer, share of the steps between two cuts in which the learning rate rises
VARIANTS: dict[str, tuple[str, float]] = {
    "reset": ("reset", 0.0),
    "reset, warm-up": ("reset", 0.2),
    "carry": ("carry", 0.0),
    "carry, warm-up": ("carry", 0.2),
}


class Module(L.LightningModule):
    """Classify images or pixels; Adam, with a cosine to zero over ``steps`` that a new optimizer continues."""

    def __init__(self, net: nn.Module, example: Tensor, steps: int, rate: float) -> None:
        super().__init__()
        self.net, self.steps, self.rate = net, steps, rate
        self.example_input_array = example

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.net(images)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of a batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Return Adam and its scheduler, which begins at the present step."""
        optimizer, start = Adam(self.parameters(), lr=self.rate), self.trainer.global_step

        def factor(step: int) -> float:
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (start + step) / self.steps)))

        scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def run(task: Task, net: nn.Module, seed: int, mode: Any, warm_up: float, compensate: bool) -> float:
    """Train and prune a copy of a dense network by one variant; return its score on the test set."""
    stage = task.stage_steps[1]
    steps = stage * CUTS + stage // 2  # half a stage before the first cut fills the optimizer's state
    callback = FilterPruningCallback(
        BUDGET,
        schedule=Linear(CUTS),
        every_n_steps=stage,
        start_step=stage // 2,
        criterion=Uniform(L2()),
        optimizer=mode,
        lr_warmup_steps=round(warm_up * stage),
        compensate=compensate,
        submodule="net",
        verbose=False,
    )
    module = Module(net, task.example, steps, RATE)
    order = torch.Generator().manual_seed(seed)
    samples = TensorDataset(task.data.train.images, task.data.train.targets)
    loader = DataLoader(samples, task.batch, shuffle=True, generator=order, drop_last=True)
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module, loader)
    if not callback.within_budget or len(callback.history) != CUTS:
        raise RuntimeError(f"{task.name}: {len(callback.history)} cuts, budget met: {callback.within_budget}")
    return score(module.net, task, task.data.test).value


def differences(better: Sequence[float], worse: Sequence[float]) -> str:
    """Return the median and the range of paired differences, in points.

    The range of five pairs covers the median with 94 % confidence.

    Example:
        >>> differences([0.52, 0.54, 0.53], [0.50, 0.50, 0.52])
        '+2.0 (+1.0 to +4.0)'
    """
    pairs = [100 * (a - b) for a, b in zip(better, worse, strict=True)]
    return f"{statistics.median(pairs):+.1f} ({min(pairs):+.1f} to {max(pairs):+.1f})"


def table(scores: dict[str, dict[str, list[float]]]) -> str:
    """Return the table of all tasks: median score of each variant, and its paired difference from ``reset``."""
    lines = [f"| | {' | '.join(scores)} |", f"|:--|{':--|' * len(scores)}"]
    for variant in VARIANTS:
        cells = [
            f"{statistics.median(rows[variant]):.3f}, {differences(rows[variant], rows['reset'])}"
            for rows in scores.values()
        ]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(
    names: Sequence[str],
    size: str,
    seeds: Sequence[int],
    folder: Path,
    compensate: bool = True,
    report: Callable[[str], None] = print,
) -> dict[str, dict[str, list[float]]]:
    """Run every variant on every task and seed; return task -> variant -> scores. Finished runs are read again."""
    path = folder / f"optimizer-{size}{'' if compensate else '-unrepaired'}.json"
    finished: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    tasks = {name: make_task(name, size) for name in names}
    for seed, (name, task), variant in itertools.product(seeds, tasks.items(), VARIANTS):
        key = f"{name} {seed} {variant}"
        if key not in finished:
            finished[key] = run(task, dense(task, seed, folder), seed, *VARIANTS[variant], compensate)
            path.write_text(json.dumps(finished, indent=1))
            report(f"{key}: {finished[key]:.4f}")
    return {name: {v: [finished[f"{name} {seed} {v}"] for seed in seeds] for v in VARIANTS} for name in names}


def main() -> None:
    """Run the measurement and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["brain", "fashion"])
    parser.add_argument("--size", default="study", help="small: a few steps, for tests")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--unrepaired", action="store_true", help="with compensate=False")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    print(
        table(
            measure(
                arguments.tasks,
                arguments.size,
                range(1, arguments.seeds + 1),
                arguments.folder,
                not arguments.unrepaired,
            )
        )
    )


if __name__ == "__main__":
    main()
