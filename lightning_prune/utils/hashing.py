"""SHA-256 digests of networks, batches and plain values. Some are stored in files: they must not change."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.utils.modules import named_tensors

__all__ = ["batch_digest", "json_digest", "network_digest"]


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


def _bytes_of(tensor: Tensor) -> bytes:
    if not tensor.numel():
        return b""  # numpy refuses to view an empty array as bytes
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
