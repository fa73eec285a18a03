"""What the terminal of this process can show."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import textwrap
from typing import TextIO

__all__ = ["duration", "fitted", "is_live", "say"]


def is_live() -> bool:
    """Return whether lines that are drawn again and again can be shown.

    So it is on a terminal, unless ``NO_COLOR`` is set, and in a main process: workers share its terminal.
    """
    is_main = multiprocessing.current_process().name == "MainProcess"
    return (
        is_main
        and sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb"
    )


def say(step: str) -> None:
    """Print what is done next, of a command that works for a while; to stderr, since stdout has the results."""
    print(fitted(f"{step} ...", stream=sys.stderr), file=sys.stderr, flush=True)


def fitted(text: str, indent: str = "    ", stream: TextIO | None = None) -> str:
    """Return a text in lines that a terminal does not break; unchanged where the output is no terminal.

    Args:
        text: one line.
        indent: before all lines but the first.
        stream: where it is printed; None: stdout.
    """
    width = shutil.get_terminal_size().columns
    if not (stream or sys.stdout).isatty() or len(text) <= width:
        return text
    return textwrap.fill(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def duration(seconds: float) -> str:
    """Return a time as people say it.

    Example:
        >>> duration(42), duration(184), duration(7500), duration(200_000)
        ('42 s', '3:04 min', '2:05 h', '2 d 7 h')
    """
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02} h" if hours < 24 else f"{hours // 24} d {hours % 24} h"
