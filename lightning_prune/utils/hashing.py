"""SHA-256 digests of networks, batches and plain values. Some are stored in files: they must not change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lightning_prune.utils.modules import named_tensors

__all__ = ["batch_digest", "is_plain_tensor", "json_digest", "network_digest", "value_digest"]

MAX_REPEATED_BYTES = 2**26  # of a tensor that has fewer values in memory than elements, as after expand()


def json_digest(value: Any) -> str:
    """Return the digest of anything that JSON can write; 64 hexadecimal digits.

    Example:
        >>> json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def batch_digest(batches: Any) -> str:
    """Return the digest of the values of all tensors in a nested structure; 16 hexadecimal digits.

    Example:
        >>> first, second = [(torch.zeros(2), "a")], [(torch.ones(2), "a")]
        >>> batch_digest(first) == batch_digest(second), len(batch_digest(first))
        (False, 16)
    """
    digest = hashlib.sha256()
    for leaf in tree_leaves(batches):
        if isinstance(leaf, Tensor):
            digest.update(_bytes_of(leaf))
    return digest.hexdigest()[:16]


def network_digest(net: nn.Module) -> str:
    """Return the digest of names, types, shapes and values of all parameters and buffers; 64 hexadecimal digits.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = network_digest(net)
        >>> _ = net.bias.data.add_(1e-3)
        >>> network_digest(net) == before
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(net).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def value_digest(value: Any) -> str:
    """Return the digest of a nested structure of tensors and plain values; 64 hexadecimal digits.

    Of other objects, and of tensors without plain values (sparse, nested, quantised, on the meta device), only the
    kind is considered.

    Example:
        >>> value_digest({"a": torch.zeros(2)}) == value_digest({"a": torch.zeros(2)})
        True
        >>> value_digest({"a": torch.zeros(2)}) == value_digest({"a": torch.zeros(1, 2)})
        False
    """
    digest = hashlib.sha256()
    for piece in _pieces(value):
        digest.update(piece)
    return digest.hexdigest()


def is_plain_tensor(tensor: Tensor) -> bool:
    """Return whether a tensor is strided, with its values in memory, and not far larger than that memory.

    Example:
        >>> is_plain_tensor(torch.zeros(2)), is_plain_tensor(torch.zeros(2).to_sparse())
        (True, False)
    """
    plain = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)
    plain = plain and not is_traceable_wrapper_subclass(tensor)  # its values are those of tensors within it
    # A hostile file may hold a tensor that repeats one value a billion times.
    return plain and tensor.nbytes <= max(tensor.untyped_storage().nbytes(), MAX_REPEATED_BYTES)


def _pieces(value: Any) -> Iterator[bytes]:
    """Yield bytes that together distinguish the value from all others."""
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {value.layout} {tuple(value.shape) if not value.is_nested else ''};".encode()
        if is_plain_tensor(value):
            yield _bytes_of(value.resolve_conj().resolve_neg())
        else:
            yield f"{type(value).__qualname__} {value.device.type};".encode()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)};".encode()
        for entry in value.items():
            yield from _pieces(entry)
    elif isinstance(value, (list, tuple)):
        yield f"sequence {len(value)};".encode()
        for entry in value:
            yield from _pieces(entry)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield f"{type(value).__name__} {value!r};".encode("utf-8", "surrogatepass")
    else:
        yield f"{type(value).__qualname__};".encode()


def _bytes_of(tensor: Tensor) -> bytes:
    if not tensor.numel():
        return b""  # numpy refuses to view an empty array as bytes
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
