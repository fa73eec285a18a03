"""NEW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is among ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def check_option(name: str, value: str, options: Any) -> None:
    """Raise ValueError unless ``value`` is one of a Literal's."""
    if value not in get_args(options):
        raise ValueError(f"{name} must be one of {', '.join(get_args(options))}, got {value!r}")
