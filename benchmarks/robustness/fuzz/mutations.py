"""Random damage to files: of their bytes, and of single values in what they hold."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

__all__ = ["change_value", "damage_bytes", "damage_content"]

NUMBERS = (0, -1, 2, 10**9, 2**63, 10**400, 0.5, float("nan"), float("inf"), None, True, "1", [], {})
TEXTS = ("", "x", "../x", "\x00", None, 3, [], {})


def damage_bytes(data: bytes, rng: Random) -> bytes:
    """Return the bytes of a file after one accident: changed, lost, repeated, moved or foreign bytes.

    Example:
        >>> damage_bytes(b"abcdef", Random(0)) == b"abcdef"
        False
    """
    start, length = rng.randrange(len(data)), rng.choice([1, 1, 4, 64, 512])
    part, other = data[start : start + length], rng.randrange(len(data))
    changed = bytearray(data)
    kind = rng.choice(
        ["bit", "bit", "byte", "zeros", "noise", "lost", "repeated", "inserted", "cut off", "moved"]
    )
    if kind == "bit":
        changed[start] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        changed[start] = rng.randrange(256)
    elif kind in ("zeros", "noise"):
        changed[start : start + length] = bytes(len(part)) if kind == "zeros" else rng.randbytes(len(part))
    elif kind == "lost":
        del changed[start : start + length]
    elif kind == "cut off":
        del changed[start:]
    elif kind in ("repeated", "moved"):
        changed[other:other] = part
    else:
        changed[start:start] = rng.randbytes(length)
    return bytes(changed)


def damage_content(path: Path, rng: Random) -> None:
    """Change one value in a JSON file, a safetensors file or a file of ``torch.save``, and write it anew."""
    if path.suffix == ".json":
        path.write_text(json.dumps(change_value(json.loads(path.read_text()), rng)))
    elif path.suffix == ".safetensors":
        _damage_safetensors(path, rng)
    else:
        torch.save(change_value(torch.load(path, weights_only=True), rng), path)


def change_value(value: Any, rng: Random) -> Any:
    """Return a nested structure in which one value, or one key, is another.

    Example:
        >>> change_value({"a": [1]}, Random(0)) == {"a": [1]}
        False
    """
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        if rng.random() < 0.1:
            return rng.choice([_without, _renamed])(value, name)
        return {**value, name: change_value(value[name], rng)}
    if isinstance(value, (list, tuple)) and len(value) and rng.random() < 0.8:
        index = rng.randrange(len(value))
        changed = [change_value(entry, rng) if i == index else entry for i, entry in enumerate(value)]
        return type(value)(changed)
    if isinstance(value, Tensor):
        return rng.choice(TENSOR_CHANGES)(value)
    if isinstance(value, str):
        return rng.choice([value + "x", value[1:], *TEXTS])
    if isinstance(value, (int, float)):
        return rng.choice([value + 1, value - 1, -value, *NUMBERS])
    return rng.choice([*NUMBERS, *TEXTS])


def _without(content: dict[Any, Any], name: Any) -> dict[Any, Any]:
    return {key: value for key, value in content.items() if key != name}


def _renamed(content: dict[Any, Any], name: Any) -> dict[Any, Any]:
    return {(f"{key}x" if key == name else key): value for key, value in content.items()}


def _plus_one(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.reshape(-1)[:1] += 1
    return changed


def _quantised(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


#: A tensor -> another one in its place.
TENSOR_CHANGES: list[Callable[[Tensor], Any]] = [
    _plus_one,
    _plus_one,
    lambda tensor: tensor * torch.nan,
    lambda tensor: tensor.double(),
    lambda tensor: tensor.half(),
    lambda tensor: tensor.long(),
    lambda tensor: tensor.to(torch.complex64),
    lambda tensor: tensor[:0] if tensor.dim() else tensor[None],
    lambda tensor: tensor.reshape(-1),
    lambda tensor: tensor.to_sparse(),
    lambda tensor: tensor.to("meta"),
    lambda tensor: torch.zeros(1).expand(10**9),
    lambda tensor: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    _quantised,
    lambda tensor: 3,
    lambda tensor: None,
]


def _damage_safetensors(path: Path, rng: Random) -> None:
    """Change one value in the header of a safetensors file, or in the JSON text within it."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if rng.random() < 0.7:
        metadata = copy.copy(header["__metadata__"])
        changed = change_value(json.loads(metadata["lightning_prune"]), rng)
        header["__metadata__"] = {**metadata, "lightning_prune": json.dumps(changed)}
    else:
        header = change_value(header, rng)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
