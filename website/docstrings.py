"""Extension of griffe, which reads the docstrings for mkdocstrings."""

from __future__ import annotations

from typing import Any

import griffe

from website.roles import markdown

__all__ = ["PlainMarkdown"]


class PlainMarkdown(griffe.Extension):
    """Rewrite each docstring while the package is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a class, function or attribute."""
        _rewrite(obj)

    def on_module(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        """Rewrite the docstring of a module."""
        _rewrite(mod)


def _rewrite(obj: griffe.Object) -> None:
    if obj.docstring is not None:
        obj.docstring.value = markdown(obj.docstring.value)
