"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write", "write_text"]

MAX_NAME_BYTES = 255  # of most file systems


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8 by :func:`atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_write(path: str | Path, suffix: str = ".part") -> Iterator[Path]:
    """Replace the file at ``path`` once the block has written its new content without an error.

    The new content goes to a temporary file with a unique name in the same folder. At the end of the block it is
    flushed to disk and renamed, which the file system does in one step. If the block or the flush raises (the disk
    is full), the temporary file is removed and ``path`` keeps its content. Several writers of one path do not disturb
    each other; the last one to end wins. A process that is killed leaves its temporary file behind. A link at
    ``path`` is replaced; the file that it points to is not changed.

    Args:
        path: the file to write; folders that are missing are made.
        suffix: of the temporary name, for writers that choose the format by it.

    Yields:
        The path of the temporary file, which exists and is empty.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(folder + "/runs/it.txt") as temporary:
        ...         _ = temporary.write_text("complete")
        ...     Path(folder, "runs", "it.txt").read_text()
        'complete'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_unique_name(path.name, suffix))
    temporary.touch(
        exist_ok=False
    )  # exclusive: two writers never share a name, and a planted link is refused
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _unique_name(name: str, suffix: str) -> str:
    """Return a name for a temporary file beside ``name``, without ``name`` if that would be too long."""
    ending = f"{secrets.token_hex(4)}{suffix}"
    unique = f"{name}.{ending}"
    return unique if len(os.fsencode(unique)) <= MAX_NAME_BYTES else ending
