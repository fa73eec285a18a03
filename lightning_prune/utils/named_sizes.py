"""Sizes in attributes of modules: integers, sequences of integers, and integers under a name.

The layers of einops keep their sizes under names, ``(("h", 4),)``. Such an integer is addressed as
``attribute[key]``; every other attribute by its name alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["can_replace", "grows", "is_named_sizes", "named_path", "read_size", "write_size"]

#: einops keeps a second copy, from which a layer is shown and copied: attribute -> attribute of the copy.
_COPIES = {"_axes_lengths": "axes_lengths"}


def is_named_sizes(value: Any) -> bool:
    """Return whether ``value`` is a tuple of pairs of a name and an integer.

    Example:
        >>> is_named_sizes((("h", 4), ("w", 2))), is_named_sizes((4, 2)), is_named_sizes(())
        (True, False, False)
    """
    return (
        type(value) is tuple
        and bool(value)
        and all(
            type(pair) is tuple and len(pair) == 2 and type(pair[0]) is str and type(pair[1]) is int
            for pair in value
        )
    )


def named_path(attribute: str, key: str) -> str:
    """Return the address of the integer under ``key``."""
    return f"{attribute}[{key}]"


def read_size(module: nn.Module, path: str) -> Any:
    """Return the stored value of an attribute, or of one of its named integers; None if there is none."""
    attribute, key = _split(path)
    value: Any = vars(module).get(attribute)
    if key is None:
        return value
    return dict(value).get(key) if is_named_sizes(value) else None


def write_size(module: nn.Module, path: str, value: Any) -> None:
    """Set an attribute, or one of its named integers and its copy; containers are replaced, not changed.

    A list replaces a tuple or another sequence as an object of that type.
    """
    attribute, key = _split(path)
    if key is None:
        current = vars(module).get(attribute)
        if isinstance(current, (tuple, list)) and isinstance(value, list):
            value = type(current)(value)
        setattr(module, attribute, value)
        return
    sizes = {**dict(vars(module)[attribute]), key: value}
    setattr(module, attribute, tuple(sizes.items()))
    copy = _COPIES.get(attribute)
    if copy is not None and isinstance(vars(module).get(copy), dict):
        setattr(module, copy, {**vars(module)[copy], key: value})


def can_replace(current: Any, value: int | list[int], least: int) -> bool:
    """Return whether ``current`` is an integer or a sequence of integers, and ``value``, from ``least`` on, likewise.

    Example:
        >>> can_replace((4, 4), [2, 4], least=1), can_replace(4, [2], least=1), can_replace(4, 0, least=1)
        (True, False, False)
    """
    sizes, before = _as_list(value), _as_list(current)
    same = isinstance(value, list) == isinstance(current, (tuple, list)) and len(sizes) == len(before)
    return same and all(type(size) is int for size in before) and all(size >= least for size in sizes)


def grows(current: Any, value: int | list[int]) -> bool:
    """Return whether a size would become larger; 0 and negative numbers are no sizes.

    Example:
        >>> grows((4, 4), [2, 5]), grows(4, 3), grows(-1, 3)
        (True, False, False)
    """
    return any(size > old > 0 for size, old in zip(_as_list(value), _as_list(current), strict=True))


def _as_list(sizes: Any) -> list[Any]:
    return list(sizes) if isinstance(sizes, (tuple, list)) else [sizes]


def _split(path: str) -> tuple[str, str | None]:
    attribute, bracket, key = path.partition("[")
    return (attribute, key.removesuffix("]")) if bracket else (path, None)
