"""Write checkpoint files atomically, and find the last one that can be read."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from lightning_prune.serialization.record import RecordError
from lightning_prune.serialization.saved_network import CHECKPOINT_KEY, SavedNetwork
from lightning_prune.serialization.torch_file import UnsafeFileError, check_checksums, load_torch_file
from lightning_prune.trainer.lightning_internals import is_local_path
from lightning_prune.utils.atomic import atomic_write

__all__ = ["AtomicCheckpointIO", "last_checkpoint"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin of Lightning that replaces a checkpoint file only when the new one is complete.

    The checkpoint is written to a temporary file in the same folder, flushed to disk, and renamed. Lightning's own
    plugin writes to the system's temporary folder and moves the file. If that folder is on another file system,
    moving means copying, and a process that is killed meanwhile leaves half a file under the checkpoint's name; if
    the folder is small, it fills up. Remote paths are written and read by Lightning.

    Before a checkpoint is read, the checksums are compared that ``torch.save`` wrote for each of its parts.

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

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; the arguments are those of Lightning's own plugin.

        Raises:
            RecordError: the file is damaged.
        """
        if is_local_path(path) and Path(path).is_file():
            check_checksums(Path(path))
        return super().load_checkpoint(path, *args, **kwargs)


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint in ``folder`` or its subfolders that training can be resumed from; None if none.

    Passed over, with a warning, are damaged files (of a full disk, a killed process, or with a wrong checksum), links
    that lead nowhere, pipes, and files with weights only. Files that are deleted meanwhile are passed over silently.

    Raises:
        UnsafeFileError: the newest checkpoint is whole, but holds objects that are not loaded without permission, as
            hyperparameters may. It is not passed over, since training would silently begin from an older one.
        OSError: a checkpoint must not be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 1}, Path(folder) / "a.ckpt")
        ...     last_checkpoint(folder).name
        'a.ckpt'
    """
    files = [
        (found, path) for path in _checkpoints_in(Path(folder)) if (found := _modified(path)) is not None
    ]
    newest_first = (path for _, path in sorted(files, reverse=True))
    return next((path for path in newest_first if _can_resume(path)), None)


def _checkpoints_in(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(
        folder
    ):  # does not follow links to folders, which may form a circle
        yield from (Path(parent) / name for name in sorted(folders + files) if name.endswith(".ckpt"))


def _modified(path: Path) -> int | None:
    """Return when a file was changed last, in nanoseconds; None, with a warning, if it is no regular file."""
    try:
        status = path.stat()
    except OSError as error:  # also a circle of links
        if path.is_symlink():
            _pass_over(path, f"it is a link that leads nowhere ({error.strerror})")
        return None
    if not stat.S_ISREG(status.st_mode):
        _pass_over(path, "it is a folder, a pipe or a device, not a file")
        return None
    return status.st_mtime_ns


def _can_resume(path: Path) -> bool:
    """Return whether training can be resumed from a file; warn if not, unless it is gone."""
    try:
        reason = _what_is_missing(load_torch_file(path))
    except FileNotFoundError:
        return False
    except UnsafeFileError:
        raise
    except RecordError as error:
        reason = str(error)
    if reason:
        _pass_over(path, reason)
    return not reason


def _what_is_missing(content: Any) -> str:
    """Return why the content of a file is no checkpoint to resume from; raise RecordError if it was changed."""
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}, not a checkpoint"
    has_weights = "state_dict" in content or any(
        isinstance(value, torch.Tensor) for value in content.values()
    )
    if has_weights and "optimizer_states" not in content:
        return "it holds weights only: training cannot be resumed from it, but load_pruned reads it"
    pruned = content.get(CHECKPOINT_KEY)
    if has_weights and isinstance(pruned, Mapping):
        SavedNetwork.of(content["state_dict"], pruned)  # compares the checksums
    return ""


def _pass_over(path: Path, reason: str) -> None:
    warnings.warn(f"{path} cannot be read and is skipped: {reason}", stacklevel=4)
