"""Check of the class numbers in a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def check_mask(mask: Tensor, num_classes: int, ignore_index: int | None = None, where: str = "mask") -> None:
    """Raise if a mask has class numbers for which the network has no output.

    Args:
        mask: class numbers, any shape, integer.
        num_classes: valid numbers are ``0 .. num_classes - 1``.
        ignore_index: one further number that is allowed.
        where: name of the mask in the error message, for example its file.

    Raises:
        ValueError: a class number is out of range.

    Example:
        >>> check_mask(torch.tensor([[0, 2], [1, 255]]), num_classes=3, ignore_index=255)
        >>> check_mask(torch.tensor([[0, 3]]), num_classes=3)
        Traceback (most recent call last):
        ...
        ValueError: mask has class number 3, but num_classes=3 allows 0 to 2: ...
    """
    classes = mask if ignore_index is None else mask.where(mask != ignore_index, 0)
    if classes.numel() and not _in_range(classes, num_classes):
        number = int(classes[(classes < 0) | (classes >= num_classes)][0])
        raise ValueError(_out_of_range(number, num_classes, ignore_index, where))


def _in_range(mask: Tensor, num_classes: int) -> bool:
    low, high = torch.stack(torch.aminmax(mask)).tolist()  # one synchronisation with the device, not two
    return low >= 0 and high < num_classes


def _out_of_range(number: int, num_classes: int, ignore_index: int | None, where: str) -> str:
    """Return the error message for a class number out of range."""
    allowed = f"0 to {num_classes - 1}" + (
        "" if ignore_index is None else f" and ignore_index={ignore_index}"
    )
    return (
        f"{where} has class number {number}, but num_classes={num_classes} allows {allowed}: "
        f"raise num_classes, pass ignore_index={number} if these pixels have no class, "
        "or map the values to classes first"
    )
