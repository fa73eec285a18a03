"""Sphinx roles and headings of docstrings, rewritten to what Markdown and mkdocstrings understand."""

from __future__ import annotations

import re
from functools import cache

from website.reference import identifiers

__all__ = ["markdown"]

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([\w.]+)`")


def markdown(docstring: str) -> str:
    """Return the docstring with Markdown in place of Sphinx roles.

    Example:
        >>> markdown("See :func:`~lightning_prune.trace` and :meth:`state`.")
        'See [`trace`][lightning_prune.trace] and `state`.'
    """
    text = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return _ROLE.sub(lambda match: _link(match[1]), text)


def _link(path: str) -> str:
    name = path.rpartition(".")[2]
    target = path if path in identifiers() else _public().get(name)
    return f"[`{name}`][{target}]" if target else f"`{name}`"


@cache
def _public() -> dict[str, str]:
    """Public name -> its shortest path."""
    return {path.rpartition(".")[2]: path for path in sorted(identifiers(), key=len, reverse=True)}
