"""Checks of arguments."""

from __future__ import annotations

from collections.abc import Sequence


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is among ``choices``.

    Args:
        name: of the argument, for the error.
        value: its value.
        choices: the values allowed; ``typing.get_args`` of a ``Literal`` gives them.

    Example:
        >>> check_choice("mode", "mean", ("min", "max"))
        Traceback (most recent call last):
        ...
        ValueError: mode must be 'min' or 'max', got 'mean'
    """
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
