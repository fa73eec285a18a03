"""A picture of a network's layers: who reads whose channels, and which layers are coupled."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph.costs import Term
from lightning_prune.graph.picture_layout import Layout, Node, lay_out
from lightning_prune.graph.summary_text import group_label
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.atomic import atomic_write
from lightning_prune.utils.formatting import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Picture", "draw"]

INK, PALE, SINGLE = "#37474f", "#b0bec5", "#eceff1"
#: colours that people with a red-green weakness can tell apart, after Paul Tol
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44bb99", "#bbcc33")
X, Y = 0.56, 0.62  # inches per column and row
NAME = 30  # characters of a name that are shown, from its end
NO_BREAK = "\N{NO-BREAK SPACE}"
CHARACTERS_PER_INCH = 13  # of the legend, at most
LEGEND = 24  # groups that the legend lists


class GraphLike(Protocol):
    """The attributes of a :class:`~lightning_prune.ChannelGraph` that its picture shows."""

    layers: dict[str, Units]
    filter_dims: dict[str, int]
    bindings: dict[str, dict[int, Units]]
    pinned: dict[int, str]
    terms: dict[str, list[Term]]


class Picture:
    """A picture of a channel graph, which a notebook shows.

    Attributes:
        figure: the matplotlib figure.
        layout: the nodes and edges of the picture, with their places.
    """

    def __init__(self, figure: Figure, layout: Layout) -> None:
        self.figure, self.layout = figure, layout

    def save(self, path: str | Path) -> None:
        """Write ``.png``, ``.svg`` or ``.pdf``."""
        with atomic_write(path) as temporary:
            self.figure.savefig(temporary, dpi=130, format=Path(path).suffix[1:])

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(format="png", dpi=100, fname=buffer)
        return buffer.getvalue()

    def __repr__(self) -> str:
        return f"Picture({len(self.layout.nodes)} nodes; save it by .save('graph.svg'))"


def draw(graph: GraphLike, kept: NDArray[np.bool_], path: str | Path | None = None) -> Picture:
    """Draw a graph.

    Args:
        graph: the graph.
        kept: mask over units, of which each node shows the number.
        path: file to write; None: none.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # takes a second, which tracing need not wait for

    layout = lay_out(graph.layers, graph.filter_dims, graph.bindings, graph.terms)
    size = max(7.0, X * layout.columns + 2.0), max(3.2, Y * layout.rows + 2.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    _draw_edges(axes, layout)
    for node in layout.nodes:
        _draw_node(axes, node, graph, kept)
    _draw_levels(axes, layout)
    _draw_legend(figure, layout)
    axes.set(xlim=(-1.4, layout.columns + 1.2), ylim=(layout.rows + 0.9, -0.9))
    axes.axis("off")
    picture = Picture(figure, layout)
    if path is not None:
        picture.save(path)
    return picture


def _colour(group: int | None) -> str:
    return SINGLE if group is None else COLOURS[group % len(COLOURS)]


def _draw_edges(axes: Axes, layout: Layout) -> None:
    """Draw arrows from each writer to its readers, and a band through coupled layers."""
    for members in layout.bands():
        points = [(node.x, node.y) for node in members]
        axes.plot(*zip(*points, strict=True), color=_colour(members[0].group), lw=7, alpha=0.25, zorder=1)
    for start, end in layout.edges:
        a, b = layout.nodes[start], layout.nodes[end]
        bend = 0.0 if abs(a.x - b.x) <= 1 or a.y != b.y else -min(0.25, 1.2 / abs(a.x - b.x))
        axes.annotate(
            "",
            (b.x, b.y),
            (a.x, a.y),
            arrowprops={
                **{"arrowstyle": "-|>", "color": PALE, "lw": 0.9, "shrinkA": 9, "shrinkB": 9},
                "connectionstyle": f"arc3,rad={bend}",
            },
            zorder=2,
        )


def _draw_node(axes: Axes, node: Node, graph: GraphLike, kept: NDArray[np.bool_]) -> None:
    """Draw the number of channels in a box, with a dark edge if all are pinned, and the name below."""
    units = np.unique(np.concatenate([graph.layers[layer] for layer in node.layers]))
    sizes = sorted({_text(graph.layers[layer], kept) for layer in node.layers}, key=len)
    letter = "" if node.group is None else f"{group_label(node.group)}  "
    stays = all(unit in graph.pinned for unit in units.tolist())
    axes.text(
        node.x,
        node.y,
        letter + (sizes[-1] if len(sizes) == 1 else f"{sizes[0]}…"),
        ha="center",
        va="center",
        fontsize=7,
        color=INK if node.group is None else "white",
        fontweight="bold",
        zorder=3,
        bbox={
            **{"boxstyle": "round,pad=0.35", "facecolor": _colour(node.group), "lw": 2 if stays else 0.8},
            "edgecolor": "black" if stays else PALE if node.group is None else _colour(node.group),
        },
    )
    _draw_name(axes, node)


def _draw_name(axes: Axes, node: Node) -> None:
    """Write the name below the node, or above it, where rows of coupled layers are below."""
    up = 1 if node.name_above else -1
    axes.annotate(
        node.name if len(node.name) <= NAME else f"…{node.name[1 - NAME :]}",
        (node.x, node.y),
        (0, 9 * up),
        textcoords="offset points",
        rotation=32 * up,
        rotation_mode="anchor",
        ha="left",
        va="bottom" if up > 0 else "top",
        fontsize=7,
        color=INK,
        zorder=4,
    )


def _text(units: Units, kept: NDArray[np.bool_]) -> str:
    left = int(kept[units].sum())
    return str(left) if left == len(units) else f"{left}/{len(units)}"


def _draw_levels(axes: Axes, layout: Layout) -> None:
    """Name the resolution at the left of each level."""
    for label, y in layout.levels:
        axes.text(-0.7, y, label, ha="right", va="center", fontsize=7, color=INK, alpha=0.8)


def _draw_legend(figure: Figure, layout: Layout) -> None:
    meanings = [
        *(
            "number: channels of a layer",
            "arrow: is read by",
            "letter and colour: coupled, lose channels together",
        ),
        "black edge: pinned, keeps all",
    ]
    width = figure.get_figwidth() * CHARACTERS_PER_INCH
    sentences = " · ".join(each.replace(" ", NO_BREAK) for each in meanings)
    lines = [line.replace(NO_BREAK, " ") for line in wrap(sentences, int(width))]
    groups: Sequence[Any] = layout.groups[:LEGEND]
    shown = [
        f"{group_label(number)}: {str(group).rstrip(',')}, {counted(len(group.layers), 'layer')}"
        for number, group in enumerate(groups)
    ]
    more = len(layout.groups) - len(shown)
    shown += [f"and {more} more"] if more > 0 else []
    per_line = max(2, layout.columns // 5)
    lines += ["   ".join(shown[i : i + per_line]) for i in range(0, len(shown), per_line)]
    figure.suptitle("\n".join(lines), fontsize=9, color=INK, x=0.01, ha="left")
