"""Checksums of what a file holds, and the fingerprint of the dense network that it was made for.

A checksum finds damage and changes by hand; it does not protect against people who compute it anew. Files from before
there were checksums have none, and are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.utils.hashing import json_digest, value_digest
from lightning_prune.utils.module_walk import modules_of
from lightning_prune.utils.modules import named_tensors

__all__ = [
    "CHECKSUM",
    "INSIST",
    "Fingerprint",
    "difference",
    "fingerprint",
    "first_names",
    "sealed",
    "unsealed",
    "weight_sums",
]

CHECKSUM = "checksum"
INSIST = "pass verify=False to use it nevertheless"
#: name of a parameter or persistent buffer -> its dtype and its shape
Fingerprint = dict[str, list[Any]]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``content``, which JSON can hold, with its checksum.

    Example:
        >>> sorted(sealed({"a": 1}))
        ['a', 'checksum']
    """
    plain = json.loads(json.dumps({key: value for key, value in content.items() if key != CHECKSUM}))
    return {**plain, CHECKSUM: json_digest(plain)}


def unsealed(content: Mapping[str, Any], what: str, verify: bool = True) -> dict[str, Any]:
    """Return the content that :func:`sealed` was given.

    Args:
        content: plain values as they stand in the file; without a checksum, they are returned unchecked.
        what: names the content in the error.
        verify: whether the checksum must be right.

    Raises:
        ValueError: the content is not what was written.

    Example:
        >>> unsealed(sealed({"a": 1}), "it")
        {'a': 1}
        >>> unsealed({**sealed({"a": 1}), "a": 2}, "it")
        Traceback (most recent call last):
        ValueError: it is damaged or was changed after it was written: its checksum does not match; ...
    """
    plain = {key: value for key, value in content.items() if key != CHECKSUM}
    if verify and CHECKSUM in content and content[CHECKSUM] != json_digest(plain):
        raise ValueError(
            f"{what} is damaged or was changed after it was written: its checksum does not match; {INSIST}"
        )
    return plain


def weight_sums(weights: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksum of every entry of a state_dict: 16 hexadecimal digits of dtype, shape and values."""
    return {name: value_digest(value)[:16] for name, value in weights.items()}


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return dtype and shape of every parameter and persistent buffer of a network, shared ones once.

    Example:
        >>> fingerprint(nn.Linear(3, 2))
        {'weight': ['float32', [2, 3]], 'bias': ['float32', [2]]}
    """
    transient = {
        id(module._buffers[name])
        for module in modules_of(model)
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    }
    tensors = named_tensors(model).items()
    return {name: _form(tensor) for name, tensor in tensors if id(tensor) not in transient}


def difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return a text that names the first entries in which two fingerprints or checksums differ; empty if none does.

    Example:
        >>> difference({"w": ["float32", [2, 3]]}, {"w": ["float32", [2, 4]]})
        "'w' is float32 [2, 3] in the file, here float32 [2, 4]"
        >>> difference({"w": "12"}, {"w": "34", "b": "56"})
        "'w'; only here: 'b'"
    """
    both = [name for name in saved if name in here]
    changed = [_change(name, saved[name], here[name]) for name in both if saved[name] != here[name]]
    parts = [", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")]
    for where, names in (("in the file", saved.keys() - here.keys()), ("here", here.keys() - saved.keys())):
        if names:
            parts.append(f"only {where}: {first_names(names)}")
    return "; ".join(part for part in parts if part)


def first_names(names: Iterable[str]) -> str:
    """Return the first three names in alphabetical order, and the number of the others."""
    names = sorted(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _change(name: str, saved: Any, here: Any) -> str:
    if not (isinstance(saved, (list, tuple)) and isinstance(here, (list, tuple))):
        return repr(name)
    return f"{name!r} is {' '.join(map(str, saved))} in the file, here {' '.join(map(str, here))}"


def _form(tensor: Tensor) -> list[Any]:
    shape = None if is_lazy(tensor) else list(tensor.shape)
    return [_dtype_name(tensor.dtype), shape]


@cache
def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
