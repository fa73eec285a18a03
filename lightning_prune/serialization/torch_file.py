"""Read files of ``torch.save`` that may be damaged or hostile: nothing is run, and sizes are checked first."""

from __future__ import annotations

import pickletools
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from lightning_prune.serialization.integrity import INSIST
from lightning_prune.serialization.record import RecordError

__all__ = ["UnsafeFileError", "check_checksums", "load_torch_file"]

MAX_PICKLE_BYTES = 20_000_000  # of all that is no tensor
MAX_CONTAINERS = (
    1_000_000  # lists, dictionaries and objects; an empty one takes a byte in a file and 64 in memory
)
_CONTAINER_OPCODES = b"])}(RtQ\x81\x85\x86\x87\x8f\x91\x93"
_ZIP_MAGIC = b"PK\x03\x04"


class UnsafeFileError(RecordError):
    """A file holds objects of classes that are not loaded without permission: loading them could run code.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"hyper_parameters": Path("data")}, folder + "/a.ckpt")
        ...     try:
        ...         load_torch_file(folder + "/a.ckpt")
        ...     except UnsafeFileError as error:
        ...         "add_safe_globals([pathlib.PosixPath])" in str(error)
        True
    """


def load_torch_file(path: str | Path, verify: bool = True) -> Any:
    """Read a file of ``torch.save`` onto the CPU; only tensors and plain values, since objects could run code.

    Args:
        path: the file.
        verify: compare the checksums (CRC-32) that ``torch.save`` writes for every tensor. torch itself does not.

    Raises:
        UnsafeFileError: it holds objects of other classes.
        RecordError: it is damaged, of another kind, or would take far more memory than its size.
        OSError: there is no such file, or it must not be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"a": 1}, folder + "/a.pt")
        ...     load_torch_file(folder + "/a.pt")
        {'a': 1}
    """
    path = Path(path)
    if stat.S_ISFIFO(path.stat().st_mode):  # opening it would wait for a writer
        raise RecordError(f"{path} is a pipe, not a file")
    with path.open("rb") as file:
        check = _check_archive if file.read(4) == _ZIP_MAGIC else _check_legacy
        file.seek(0)
        try:
            check(file, path.stat().st_size, verify)
        except MemoryError:
            raise
        except Exception as error:  # the readers of the standard library raise many types for a damaged file
            raise RecordError(f"{path} is not a file of torch.save, or it is damaged: {error}") from error
    return _load(path)


def check_checksums(path: Path) -> None:
    """Raise RecordError if a part of a file of ``torch.save`` is damaged; a file without checksums is not checked."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the reader of the standard library raises many types for a damaged file
        raise RecordError(f"{path} is damaged: {error}") from error
    if damaged:
        raise RecordError(f"{path} is damaged: the checksum of {damaged} does not match")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises many types for a damaged file
        if names := _unsafe_classes(path):
            raise UnsafeFileError(_advice(path, names)) from error
        raise RecordError(
            f"{path} does not load with weights_only=True: it is damaged, or holds what no state_dict or checkpoint "
            f"holds. {error}"
        ) from error


def _unsafe_classes(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file; the caller raises the error of loading it
        return []


def _advice(path: Path, names: Sequence[str]) -> str:
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"{path} does not load with weights_only=True, since it holds objects of {listed}. If you trust the file, "
        f"call torch.serialization.add_safe_globals([{listed}]) first. In further runs, leave such objects out of "
        "the checkpoints; most of them come from hyperparameters: self.save_hyperparameters(ignore=[...]) in the "
        "LightningModule, or plain numbers and strings in their place"
    )


def _check_archive(file: IO[bytes], size: int, verify: bool) -> None:
    """Raise unless the zip archive of ``torch.save`` is complete, and not larger in memory than on disk."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise RecordError("it is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > size or len(set(names)) < len(names):
            raise RecordError(f"its parts overlap: together they are larger than its {size} bytes")
        has_checksums = verify and any(
            entry.CRC for entry in entries
        )  # set_crc32_options(False) writes zeros
        for entry in entries:
            entry.CRC = entry.CRC if has_checksums else None  # type: ignore[assignment]  # None: not compared
            if entry.filename.endswith(".pkl"):
                with archive.open(entry) as part:
                    _check_pickle_size(part.read(MAX_PICKLE_BYTES + 1))
        if has_checksums and (damaged := archive.testzip()):
            raise RecordError(f"the checksum of {damaged} does not match; {INSIST}")


def _check_pickle_size(data: bytes) -> None:
    if len(data) > MAX_PICKLE_BYTES:
        raise RecordError(f"it holds more than {MAX_PICKLE_BYTES} bytes that are no tensors")
    containers = sum(data.count(opcode) for opcode in _CONTAINER_OPCODES)
    if containers > MAX_CONTAINERS:
        raise RecordError(f"it holds more than {MAX_CONTAINERS} objects that are no tensors")


def _check_legacy(file: IO[bytes], size: int, verify: bool) -> None:
    """Raise if a file of ``torch.save`` before 1.6 (four pickles, then tensors) holds too many objects."""
    for _ in range(4):
        for number, _ in enumerate(pickletools.genops(file)):
            if number > MAX_CONTAINERS:
                raise RecordError(f"it holds more than {MAX_CONTAINERS} objects that are no tensors")
