"""Warnings of this package as sentences, without the path of the source file that raised them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from lightning_prune.utils.terminal import fitted

__all__ = ["show_sentences"]

PACKAGE = Path(__file__).resolve().parents[1]


def show_sentences() -> None:
    """From now on, print the warnings of this package as ``warning: ...``; those of others stay as they are.

    Lightning sets a format of its own when it is imported, so this is called afterwards. A second call does nothing.
    """
    others = warnings.formatwarning
    if getattr(others, "is_sentence", False):
        return

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if Path(filename).is_relative_to(PACKAGE):
            return f"{fitted(f'warning: {message}', stream=sys.stderr)}\n"
        return others(message, category, filename, lineno, line)

    formatted.is_sentence = True  # type: ignore[attr-defined]
    warnings.formatwarning = formatted
