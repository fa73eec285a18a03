"""Write checkpoint files atomically, and find the last one that can be read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from lightning_prune.serialization.atomic import atomic_write
from lightning_prune.serialization.saving import load_torch_file
from lightning_prune.trainer.lightning_internals import is_local_path

__all__ = ["AtomicCheckpointIO", "last_checkpoint"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin of Lightning that replaces a checkpoint file only when the new one is complete.

    The checkpoint is written to a temporary file in the same folder, flushed to disk, and renamed. Lightning's own
    plugin writes to the system's temporary folder and moves the file. If that folder is on another file system,
    moving means copying, and a process that is killed meanwhile leaves half a file under the checkpoint's name; if
    the folder is small, it fills up. Remote paths are written by Lightning.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(plugins=[AtomicCheckpointIO()], logger=False, accelerator="cpu")
        >>> type(trainer.strategy.checkpoint_io).__name__
        'AtomicCheckpointIO'
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint``; if the write is interrupted, the file that was at ``path`` before stays.

        Raises:
            TypeError: ``storage_options`` is given.
        """
        if storage_options is not None or not is_local_path(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest readable checkpoint in ``folder`` or its subfolders, to resume from; None if there is none.

    A damaged checkpoint, which a full disk or a killed process may leave, is skipped with a warning.

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
    return next((path for path in newest_first if _is_readable(path)), None)


def _is_readable(path: Path) -> bool:
    try:
        load_torch_file(path)
    except Exception as error:  # torch raises many types for a damaged file
        warnings.warn(f"{path} cannot be read and is skipped: {error}", stacklevel=3)
        return False
    return True
