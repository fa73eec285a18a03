"""The CSV log of trainings that are interrupted and resumed: every epoch once, as of a training that was not."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ResumableCSVLogger
from lightning_prune.reporting.epoch_log import EpochHistory, EpochLines


class Line(L.LightningModule):
    """Fits a line; logs once per epoch and every second step, and ends with an error at a step."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.layer, self.fail_at = torch.nn.Linear(1, 1), fail_at

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.global_step == self.fail_at:
            raise RuntimeError("killed")
        loss = (self.layer(batch[0]) - 1).square().mean()
        self.log_dict({"train/loss": loss}, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", self.layer(batch[0]).mean())

    def test_step(self, batch: Any, index: int) -> None:
        self.log("test/loss", self.layer(batch[0]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, epochs: int, fail_at: int = -1, checkpoint: Path | None = None) -> None:
    """Train four steps per epoch, then test; a checkpoint after every epoch and after every third step."""
    torch.manual_seed(0)
    module, data = Line(fail_at), DataLoader(TensorDataset(torch.ones(4, 1)))
    saves = [
        ModelCheckpoint(
            folder / "checkpoints", "last", enable_version_counter=False, save_on_train_epoch_end=True
        ),
        ModelCheckpoint(folder / "checkpoints", "step", enable_version_counter=False, every_n_train_steps=3),
    ]
    history = EpochHistory()
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[*saves, EpochLines("", history)],
        logger=[ResumableCSVLogger(folder, "csv", ""), history],
        log_every_n_steps=2,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data, data, ckpt_path=checkpoint)
    trainer.test(module, data, verbose=False)


def log(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open() as file:
        return [{name: text for name, text in row.items() if text} for row in csv.DictReader(file)]


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(many workers|exists and is not empty|ended before the epoch ended|dirpath has)"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Return the log of a training of three epochs that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, 3)
    return log(folder)


def comparable(rows: list[dict[str, str]], name: str) -> list[dict[str, str]]:
    """Leave out the mean over an epoch that was resumed within: Lightning takes it over the steps since then."""
    partial = ("train/loss_epoch",) if name == "step" else ()
    return [{key: text for key, text in row.items() if key not in partial} for row in rows]


@pytest.mark.parametrize("place", ["same", "other"])
@pytest.mark.parametrize("name", ["last", "step"])
def test_a_training_that_goes_on_has_the_log_of_one_that_was_not_interrupted(
    tmp_path: Path, whole: list[dict[str, str]], place: str, name: str
) -> None:
    """Checkpoints are from the end of the second epoch (step 8) and from within it (step 6)."""
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "same", 3, fail_at=8 if name == "step" else 11)
    assert [row["epoch"] for row in log(tmp_path / "same") if "val/loss" in row] == ["0", "1"]
    before = (tmp_path / "same" / "csv" / "metrics.csv").read_bytes()
    train(tmp_path / place, 3, checkpoint=tmp_path / "same" / "checkpoints" / f"{name}.ckpt")
    assert comparable(log(tmp_path / place), name) == comparable(whole, name)
    assert place == "same" or (tmp_path / "same" / "csv" / "metrics.csv").read_bytes() == before


def test_a_finished_training_that_goes_on_for_more_epochs_is_tested_once(
    tmp_path: Path, whole: list[dict[str, str]]
) -> None:
    train(tmp_path, 2)
    assert "test/loss" in log(tmp_path)[-1]
    train(tmp_path, 3, checkpoint=tmp_path / "checkpoints" / "last.ckpt")
    assert log(tmp_path) == whole


def test_a_training_from_the_start_replaces_the_log(tmp_path: Path, whole: list[dict[str, str]]) -> None:
    train(tmp_path, 4)
    train(tmp_path, 3)
    assert log(tmp_path) == whole


@pytest.mark.parametrize("damage", ["gone", "half a line"])
def test_what_a_log_lacks_comes_from_the_checkpoint(
    tmp_path: Path, whole: list[dict[str, str]], damage: str
) -> None:
    """The folder was moved without its log, or the process was killed while it wrote the last row."""
    train(tmp_path / "first", 2)
    file = tmp_path / "first" / "csv" / "metrics.csv"
    if damage == "gone":
        shutil.rmtree(file.parent)
    else:
        lines = [line for line in file.read_text().splitlines() if line]
        assert lines[-2].count(",") == lines[0].count(",")
        file.write_text(
            "\n".join(lines[:-1])[:-3]
        )  # without the test, and within the means of the second epoch
    train(tmp_path / "second", 3, checkpoint=tmp_path / "first" / "checkpoints" / "last.ckpt")
    for name in ("val/loss", "train/loss_epoch"):
        assert [float(row[name]) for row in log(tmp_path / "second") if name in row] == pytest.approx(
            [float(row[name]) for row in whole if name in row]
        )
