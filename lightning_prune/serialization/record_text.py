"""A pruning record in one line, and as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import prod

from lightning_prune.utils.formatting import si

__all__ = ["html_rows", "one_line"]

Kept = Mapping[str, Mapping[int, Sequence[int]]]
MOST_ROWS = 300


def one_line(kept: Kept, shapes: Mapping[str, Sequence[int]]) -> str:
    """Return how many tensors were cut, and how many values they had and have.

    Example:
        >>> one_line({"weight": {0: [0, 2]}}, {"weight": [3, 4]})
        '1 tensor cut, 12 → 8 values'
    """
    if not kept:
        return "nothing cut"
    before = sum(prod(shapes.get(name, ())) for name in kept)
    after = sum(prod(_left(dims, shapes.get(name, ()))) for name, dims in kept.items())
    return f"{len(kept)} tensor{'s' * (len(kept) != 1)} cut, {si(before)} → {si(after)} values"


def html_rows(kept: Kept, shapes: Mapping[str, Sequence[int]]) -> str:
    """Return a table with the shape of each tensor before and after."""
    rows = [
        f"<tr><td style='text-align:left'>{escape(name)}</td><td>{_shape(shapes.get(name, ()))}</td>"
        f"<td>{_shape(_left(dims, shapes.get(name, ())))}</td></tr>"
        for name, dims in list(kept.items())[:MOST_ROWS]
    ]
    more = len(kept) - MOST_ROWS
    last = f"<p>and {more} more</p>" if more > 0 else ""
    head = "<tr><th style='text-align:left'>tensor</th><th>dense</th><th>pruned</th></tr>"
    table = f"<table>{head}{''.join(rows)}</table>{last}" if rows else ""
    return f"<details open><summary>{one_line(kept, shapes)}</summary>{table}</details>"


def _left(dims: Mapping[int, Sequence[int]], shape: Sequence[int]) -> list[int]:
    return [len(dims[dim]) if dim in dims else size for dim, size in enumerate(shape)]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "-"
