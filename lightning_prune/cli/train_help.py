"""``lightning-prune train --help``, in lines that fit a terminal."""

from __future__ import annotations

import io
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

__all__ = ["fitted_help", "shown_fitted"]

WIDEST = 80
#: groups that other groups choose; nobody sets them on a command line
INNER = ("experiment/protocol:", "prune/policy:", "module:")


def fitted_help(text: str, width: int = WIDEST) -> str:
    """Return the help of Hydra with long lines broken, and without the groups that other groups choose.

    Example:
        >>> print(fitted_help("Groups\\n\\nnet: unet, fpn, deeplab\\nprune/policy: default", 20))
        Groups
        net: unet, fpn,
          deeplab
    """
    return "\n".join(_lines(text, width))


def _lines(text: str, width: int) -> Iterator[str]:
    before = ""
    for line in text.splitlines():
        if not line.startswith(INNER) and not (not line and before.startswith("Groups")):
            yield from textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False) or [""]
        before = line


@contextmanager
def shown_fitted() -> Iterator[None]:
    """Print what the block prints in lines that fit the terminal, at most 80 columns; unchanged into a pipe."""
    if not sys.stdout.isatty():  # programs read a group per line
        yield
        return
    written = io.StringIO()
    try:
        with redirect_stdout(written):
            yield
    finally:
        width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
        print(fitted_help(written.getvalue().rstrip(), width), flush=True)
