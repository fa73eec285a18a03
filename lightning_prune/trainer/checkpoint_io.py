"""Checkpoint files that are there as a whole, or not at all (level 4)."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol

__all__ = ["AtomicCheckpointIO", "last_checkpoint"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to disk, and renames it.

    Lightning's own writes to the system's temporary folder and moves the file. Where that folder lies on
    another file system, moving is copying, and whoever is killed meanwhile leaves half a file under the
    checkpoint's name; where it is small, it fills up. Remote paths are left to Lightning.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
        >>> type(trainer.strategy.checkpoint_io).__name__
        'AtomicCheckpointIO'
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint``; an interrupted write leaves what was at ``path`` before.

        Raises:
            TypeError: ``storage_options`` is given.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        with beside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in ``folder`` or below it that can be read to its end, or None: what to resume from.

    A damaged one, left behind by a full disk or a kill, is passed over with a warning.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 1}, Path(folder) / "a.ckpt")
        ...     last_checkpoint(folder).name
        'a.ckpt'
    """
    newest_first = sorted(
        Path(folder).rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True
    )
    return next((path for path in newest_first if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch raise
        warnings.warn(f"{path} cannot be read and is passed over: {error}", stacklevel=3)
        return False
    return True
