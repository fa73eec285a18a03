"""NEW."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.utils.modules import named_tensors


def fingerprint(held: Any) -> str:
    """A digest of all tensors in batches.

    Example:
        >>> first, second = [(torch.zeros(2), "a")], [(torch.ones(2), "a")]
        >>> fingerprint(first) == fingerprint(second), len(fingerprint(first))
        (False, 16)
    """
    found = hashlib.sha256()
    for tensor in (each for each in tree_leaves(held) if isinstance(each, Tensor)):
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return found.hexdigest()[:16]


def checksum(net: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all parameters and buffers.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> before = checksum(net)
        >>> _ = net.bias.data.add_(1e-3)
        >>> checksum(net) == before
        False
    """
    found = hashlib.sha256()
    for name, tensor in sorted(named_tensors(net).items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return found.hexdigest()
