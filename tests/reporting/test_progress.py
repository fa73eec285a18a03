"""Tests of what a run prints: its first lines, the bar of the epoch, and the lines of epochs and cuts."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterPruningCallback, PruningPolicy, trace
from lightning_prune.pruning.cut_summary import CutSummary, budget_warning
from lightning_prune.reporting import live_bar
from lightning_prune.reporting.banner import _pruning
from lightning_prune.reporting.epoch_log import EpochLines
from lightning_prune.reporting.live_bar import LiveBar
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.utils.formatting import counted
from lightning_prune.utils.terminal import fitted, is_live

pytestmark = pytest.mark.filterwarnings("ignore:(GPU available|budget .* not met|.*many workers)")


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 2, 3))
        self.example_input_array = torch.rand(1, 1, 8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("train/loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/miou", self.net(batch[0]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def train(*callbacks: L.Callback, epochs: int = 3, module: L.LightningModule | None = None) -> None:
    loader = DataLoader(TensorDataset(torch.rand(6, 1, 8, 8)), 1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options: dict[str, Any] = {
        **quiet,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
    }
    trainer = L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **options)
    trainer.fit(module or Tiny(), loader, loader)


def drawn(width: int, monkeypatch: pytest.MonkeyPatch, *others: L.Callback, **options: Any) -> list[str]:
    """Return the lines that the bar draws in a training, in order, without escape sequences."""
    monkeypatch.setattr(live_bar, "INTERVAL", 0.0)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    train(LiveBar(" 3/12 │ ", lambda left, total: left + 9 * total, console), *others, **options)
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_shows_the_epoch_and_the_time_of_run_and_sweep_in_one_line(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line for line in drawn(width, monkeypatch) if line.strip()]
    assert all(len(line) <= width for line in lines)
    assert all(line.startswith(" 3/12 │ epoch ") for line in lines)
    last = [line for line in lines if "epoch 3/3" in line][-1]
    assert re.search(r"100% · 0 s left · all \d+ s$", last.strip())
    shares = [int(share) for line in lines if "epoch 2/3" in line for share in re.findall(r"(\d+)%", line)]
    assert shares == sorted(shares)
    assert len(set(shares)) >= 12  # six batches of training, six of validation


def test_the_bar_is_gone_while_the_network_is_cut_and_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            assert trainer.callbacks[0]._progress is None  # type: ignore[attr-defined]
            if trainer.current_epoch == 1:
                raise RuntimeError("stop")

    bar = LiveBar(console=Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(RuntimeError, match="stop"):
        train(bar, Watch())
    assert bar._progress is None
    assert sys.stdout is not None
    print("the terminal is free again")


def test_each_epoch_and_each_cut_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    pruning = FilterPruningCallback({"macs": 0.4}, amount={"macs": 0.2}, start_epoch=0, verbose=False)
    train(LiveBar(), pruning, EpochLines("one │ "))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:15] for line in lines if "epoch" in line] == [
        "one │ epoch 1/3",
        "one │ epoch 2/3",
        "one │ epoch 3/3",
    ]
    cuts = [line for line in lines if line.startswith("one │   ✂ cut ")]
    assert len(cuts) == len(pruning.history) >= 2
    assert lines.index(cuts[0]) == 1  # right after the epoch at whose end it was made
    assert "━" not in "".join(lines)  # no bar in a pipe


def test_cuts_within_an_epoch_have_their_line_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    pruning = FilterPruningCallback({"macs": 0.4}, amount={"macs": 0.2}, every_n_steps=3, verbose=False)
    train(pruning, EpochLines(), epochs=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip()[:5] for line in lines] == ["✂ cut"] * len(pruning.history) + ["epoch"]


def test_lines_are_drawn_again_on_terminals_with_colour_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not is_live()  # the tests are no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert is_live()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_live()


def test_long_lines_are_broken_between_words_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "cut 107 filters: 89.9 % of MACs, 98.6 % of parameters left · repaired 0.31 → 0.064"
    monkeypatch.setenv("COLUMNS", "60")
    assert fitted(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert all(len(line) <= 60 for line in fitted(text).splitlines())
    assert fitted(text).replace("\n    ", " ") == text


def test_a_cut_of_one_filter_is_said_in_singular() -> None:
    assert counted(1, "filter") == "1 filter"
    summary = CutSummary(1, 1, 1, {"macs": 100}, {"macs": 60}, {"macs": 0.6}, "amount", 0.5)
    assert str(summary).startswith("epoch 1: cut 1 filter in 1 layer")


def test_the_first_lines_name_a_criterion_that_is_a_function_of_ones_own() -> None:
    criterion = {"_target_": "hydra.utils.get_object", "path": "project.criteria.closeness"}
    prune = {
        "_target_": "lightning_prune.FilterPruningCallback",
        "budget": {"macs": 0.5},
        "criterion": criterion,
    }
    line = _pruning(OmegaConf.create({"prune": prune}), {"prune": "l1", "prune/criterion": "function"})
    assert line == "l1 (closeness) to 50 % of the MACs"


def test_a_budget_that_is_not_met_is_told_in_words() -> None:
    graph = trace(nn.Conv2d(1, 2, 1), torch.zeros(1, 1, 2, 2))
    policy = PruningPolicy({"macs": 0.5, "params": 1000.0})
    text = budget_warning(policy, graph, DenseSizes.of(graph), None)
    assert text.startswith(
        "budget of 50 % of the MACs and 1 k parameters not met: macs 1.000, params 1.000 of "
    )
