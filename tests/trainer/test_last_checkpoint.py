"""Tests of last_checkpoint: what is passed over in a living folder, and what is not."""

from __future__ import annotations

import argparse
import os
import pathlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import AtomicCheckpointIO, RecordError, UnsafeFileError, last_checkpoint, load_pruned
from lightning_prune.trainer import checkpoint_io

WHOLE = {"epoch": 1, "state_dict": {"weight": torch.zeros(2)}, "optimizer_states": [], "loops": {}}


class Rooted(L.LightningModule):
    """Keeps a path among its hyperparameters."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(2, 2)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.net(batch[0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@dataclass
class Settings:
    width: int = 3


def write(path: Path, content: Any, second: int) -> Path:
    """Write a checkpoint that was last changed at a second."""
    torch.save(content, path)
    os.utime(path, (second, second))
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint that training can be resumed from, older than all others in the folder."""
    return write(tmp_path / "whole.ckpt", WHOLE, 1)


@pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|not find|tensorboard)")
def test_hyperparameters_that_need_permission_are_named_and_not_passed_over(tmp_path: Path) -> None:
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[ModelCheckpoint(tmp_path)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Rooted(pathlib.Path("/data")), DataLoader(TensorDataset(torch.zeros(4, 2)), 2))
    (path,) = tmp_path.iterdir()
    with pytest.raises(UnsafeFileError, match=r"add_safe_globals\(\[pathlib.PosixPath\]\).*ignore=") as error:
        last_checkpoint(tmp_path)
    assert str(path) in str(error.value)
    with pytest.raises(UnsafeFileError, match="add_safe_globals"):
        load_pruned(Rooted(Path()), path)
    with torch.serialization.safe_globals([pathlib.PosixPath]):
        assert last_checkpoint(tmp_path) == path


@pytest.mark.parametrize(
    "value",
    [argparse.Namespace(a=1), Settings(), np.float64(0.5), OmegaConf.create({"a": 1}), print],
    ids=lambda value: type(value).__name__,
)
def test_every_object_that_needs_permission_is_named(tmp_path: Path, whole: Path, value: Any) -> None:
    write(tmp_path / "new.ckpt", {**WHOLE, "hyper_parameters": {"it": value}}, 2)
    with pytest.raises(UnsafeFileError, match=r"new.ckpt .*add_safe_globals\(\[.*\w.*\]\)"):
        last_checkpoint(tmp_path)


def test_an_older_file_that_needs_permission_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path / "old.ckpt", {**WHOLE, "hyper_parameters": {"it": Settings()}}, 1)
    new = write(tmp_path / "new.ckpt", WHOLE, 2)
    assert last_checkpoint(tmp_path) == new


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a link to nowhere": (lambda path: path.symlink_to("gone.ckpt"), "link that leads nowhere"),
    "a circle of links": (lambda path: path.symlink_to(path.name), "link that leads nowhere"),
    "a pipe": (os.mkfifo, "a pipe"),
    "a folder": (Path.mkdir, "a folder"),
    "an empty file": (Path.touch, "damaged"),
    "text": (lambda path: path.write_text("no checkpoint"), "damaged"),
    "weights only": (lambda path: torch.save({"state_dict": {}, "epoch": 2}, path), "weights only"),
    "a state_dict": (lambda path: torch.save({"weight": torch.zeros(1)}, path), "weights only"),
    "a tensor": (lambda path: torch.save(torch.zeros(1), path), "a Tensor, not a checkpoint"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_training_cannot_be_resumed_from_is_passed_over_with_a_warning(
    tmp_path: Path, whole: Path, name: str
) -> None:
    make, message = OTHERS[name]
    make(tmp_path / "new.ckpt")
    with pytest.warns(UserWarning, match=f"new.ckpt cannot be read and is skipped: .*{message}"):
        assert last_checkpoint(tmp_path) == whole


def test_a_changed_bit_is_found_by_the_checksum(tmp_path: Path, whole: Path) -> None:
    new = write(tmp_path / "new.ckpt", {**WHOLE, "state_dict": {"weight": torch.full((64,), 0.7)}}, 2)
    data = bytearray(new.read_bytes())
    data[data.index(torch.full((64,), 0.7).numpy().tobytes()) + 9] ^= 1
    new.write_bytes(data)
    with pytest.warns(UserWarning, match="checksum of .* does not match"):
        assert last_checkpoint(tmp_path) == whole
    with pytest.raises(RecordError, match="verify=False"):
        load_pruned(nn.Linear(2, 2), new)
    with pytest.raises(RecordError, match="is damaged: the checksum of"):
        AtomicCheckpointIO().load_checkpoint(new)
    assert AtomicCheckpointIO().load_checkpoint(whole, weights_only=True)["epoch"] == 1


def test_checkpoints_that_torch_wrote_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = write(tmp_path / "it.ckpt", WHOLE, 1)
    finally:
        torch.serialization.set_crc32_options(True)
    assert last_checkpoint(tmp_path) == path
    assert AtomicCheckpointIO().load_checkpoint(path)["epoch"] == 1


def test_a_link_to_a_checkpoint_is_followed(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path)  # a circle of folders
    link = tmp_path / "a" / "last.ckpt"
    link.symlink_to(whole)
    assert last_checkpoint(tmp_path / "a") == link


def test_a_file_that_is_deleted_meanwhile_is_passed_over_silently(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, load = write(tmp_path / "new.ckpt", WHOLE, 2), checkpoint_io.load_torch_file

    def load_late(path: Path) -> Any:
        new.unlink(missing_ok=True)
        return load(path)

    monkeypatch.setattr(checkpoint_io, "load_torch_file", load_late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_checkpoint(tmp_path) == whole
