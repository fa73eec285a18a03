"""Read JSON files that may be damaged or hostile: sizes are checked before anything is parsed, numbers are finite."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["MAX_BYTES", "integers", "parse_json", "plain_json", "read_json"]

MAX_BYTES = 100_000_000  # of a file; a safetensors header may have as many
MAX_CONTAINERS = (
    1_000_000  # lists, objects and strings; an empty list takes 3 bytes in a file and 64 in memory
)
MAX_VALUES = 10_000_000
LARGEST = 2**63 - 1  # the largest size that a tensor can have


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: it is no JSON, is too large, or holds a number that is not finite.
        OSError: there is no such file, or it must not be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.json").write_text('{"a": NaN}')
        ...     read_json(folder + "/a.json")
        Traceback (most recent call last):
        ValueError: NaN is not a finite number
    """
    status = Path(path).stat()
    if stat.S_ISFIFO(status.st_mode):  # opening it would wait for a writer
        raise ValueError("it is a pipe, not a file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"it has {status.st_size} bytes, at most {MAX_BYTES} are read")
    return parse_json(Path(path).read_bytes())


def parse_json(text: str | bytes) -> Any:
    """Return the content of a JSON text; errors are those of :func:`read_json`."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    containers = data.count(b"[") + data.count(b"{") + data.count(b'"') // 2
    if len(data) > MAX_BYTES or containers > MAX_CONTAINERS or data.count(b",") > MAX_VALUES:
        raise ValueError(
            f"it has {len(data)} bytes and {containers} lists, objects and strings, which is too much"
        )
    try:
        return json.loads(data.decode("utf-8"), parse_float=_finite, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def integers(values: Any) -> list[int]:
    """Return values of a JSON file as a list of integers that tensors can have as sizes.

    Raises:
        ValueError: they are a text, are not all integers, or one is too large.

    Example:
        >>> integers([3, 4])
        [3, 4]
    """
    result = list(values)
    if isinstance(values, (str, bytes)) or any(type(value) is not int for value in result):
        raise ValueError(f"expected a list of integers, got {str(values)[:40]}")
    if result and not -LARGEST <= min(result) <= max(result) <= LARGEST:
        raise ValueError("a number is larger than any size")
    return result


def plain_json(value: Any) -> Any:
    """Return a value as JSON stores it: keys are texts, numbers that are not finite are None, other objects texts.

    Example:
        >>> plain_json({1: (float("nan"), Path("a"))})
        {'1': [None, 'a']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is not a finite number")
