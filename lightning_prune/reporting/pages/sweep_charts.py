"""Charts of several runs: the Pareto front of score and size, and parallel coordinates of their settings."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lightning_prune.reporting.pages.charts import DENSE, PRUNED, Chart, layout

__all__ = ["SIZES", "Axis", "front", "numbers_of", "parallel_chart", "pareto_chart"]

#: field of ``Sizes`` -> its name and unit on an axis
SIZES = {"macs": "MACs", "params": "parameters", "latency_ms": "latency in ms", "bytes": "file size in bytes"}
#: from low to high scores; all visible on white and on black
SCALE = ("#d9822b", "#c9a06b", "#9aa0a6", "#6b93c0", "#2f7fd1")
MOST_TICKS = 6
AXIS_WIDTH = 110  # pixels that an axis of parallel coordinates needs at least

#: a title, and for each run a number, a text, or None
Axis = tuple[str, Sequence[Any]]


def front(sizes: Sequence[float], scores: Sequence[float], higher_is_better: bool = True) -> list[int]:
    """Return the numbers of the runs that no other run beats: smaller and not worse, or better and not larger.

    Args:
        sizes: of each run; less is better.
        scores: of each run.
        higher_is_better: whether high scores are good.

    Returns:
        Numbers in the order of their sizes; runs without a finite size and score are left out.

    Example:
        >>> front([1, 2, 2, 3], [0.5, 0.7, 0.6, 0.7])
        [0, 1]
    """
    sign = -1.0 if higher_is_better else 1.0
    pairs = [
        (float(size), sign * float(score), number)
        for number, (size, score) in enumerate(zip(sizes, scores, strict=True))
    ]
    best, chosen, last = math.inf, [], None
    for size, loss, number in sorted(
        pair for pair in pairs if math.isfinite(pair[0]) and math.isfinite(pair[1])
    ):
        if loss < best or (size, loss) == last:
            chosen.append(number)
            best, last = loss, (size, loss)
    return chosen


def pareto_chart(
    names: Sequence[str],
    sizes: Sequence[float],
    scores: Sequence[float],
    chosen: Sequence[int],
    titles: tuple[str, str],
    joined: bool,
) -> Chart:
    """Return a point for each run, with those of the front in colour.

    Args:
        names: of the runs.
        sizes: of the runs.
        scores: of the runs.
        chosen: numbers of the runs of the front.
        titles: of the axes.
        joined: whether the front is a line: it is one in the scores that it was chosen by.
    """
    others = [number for number in range(len(names)) if number not in set(chosen)]
    series = [
        {**_points(names, sizes, scores, others), **_look("other runs", DENSE, 9)},
        {
            **_points(names, sizes, scores, chosen),
            **_look("Pareto front", PRUNED, 12),
            **{"mode": "lines+markers+text" if joined else "markers+text", "textposition": "top center"},
            **{"line": {"color": PRUNED, "width": 1.5, "dash": "dot"}, "cliponaxis": False},
        },
    ]
    drawn = [each for each in series if each["x"]]
    x, y = ({value for each in drawn for value in each[axis]} for axis in "xy")
    horizontal = {"exponentformat": "SI", "rangemode": "normal", **_around(x)}
    return {"data": drawn, "layout": layout(titles[1], titles[0], xaxis=horizontal, yaxis=_around(y))}


def _around(values: Collection[float]) -> Chart:
    """Return a range around a single value; else Plotly chooses one, with ticks that hardly differ."""
    if len(values) != 1 or not (value := next(iter(values))):
        return {}
    return {"range": sorted([0.5 * value, 1.5 * value])}


def _points(
    names: Sequence[str], sizes: Sequence[float], scores: Sequence[float], runs: Sequence[int]
) -> Chart:
    known = [n for n in runs if math.isfinite(sizes[n]) and math.isfinite(scores[n])]
    return {
        **{"type": "scatter", "x": [sizes[n] for n in known], "y": [scores[n] for n in known]},
        **{"customdata": known, "text": [names[n] for n in known]},
        "hovertemplate": "run %{text}<br>%{y:.4f} at %{x:.4s}<extra></extra>",
    }


def _look(name: str, colour: str, size: int) -> Chart:
    return {"name": name, "mode": "markers", "marker": {"color": colour, "size": size}}


def numbers_of(values: Sequence[Any]) -> list[float] | None:
    """Return settings as numbers; None if one of them is a text.

    Example:
        >>> numbers_of(["0.5", "1e-3", None]), numbers_of(["l2", "1"])
        ([0.5, 0.001, nan], None)
    """
    try:
        return [math.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        return None


def parallel_chart(names: Sequence[str], axes: Sequence[Axis], scores: Sequence[float]) -> Chart | None:
    """Return a line for each run across an axis for each setting and result; None with fewer than two runs or axes.

    Args:
        names: of the runs.
        axes: settings, sizes and scores.
        scores: that colour the lines.
    """
    if len(names) < 2 or len(axes) < 2:
        return None
    placed = [_placed(values) for _, values in axes]
    data = [
        _run_line(number, name, axes, placed, _colour(scores, number)) for number, name in enumerate(names)
    ]
    ticks = [tick for x, (_, marks) in enumerate(placed) for tick in _ticks(x, marks)]
    heads = [_text(x, 1.09, f"<b>{title}</b>", "center") for x, (title, _) in enumerate(axes)]
    rules = [
        {
            "type": "line",
            "x0": x,
            "x1": x,
            "y0": 0,
            "y1": 1,
            "layer": "below",
            "line": {"color": "$line", "width": 1.5},
        }
        for x in range(len(axes))
    ]
    hidden = {"visible": False, "fixedrange": True}
    return {
        "data": data,
        "layout": {
            **{"shapes": rules, "annotations": [*heads, *ticks], "showlegend": False, "hovermode": "closest"},
            **{
                "xaxis": {**hidden, "range": [-0.5, len(axes) - 0.5]},
                "yaxis": {**hidden, "range": [-0.06, 1.16]},
            },
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        },
        "width": AXIS_WIDTH * len(axes),
    }


def _run_line(
    number: int,
    name: str,
    axes: Sequence[Axis],
    placed: Sequence[tuple[list[float | None], Any]],
    colour: str,
) -> Chart:
    facts = "<br>".join(f"{title}: {_show(values[number])}" for title, values in axes)
    return {
        **{"type": "scatter", "mode": "lines+markers", "x": list(range(len(axes))), "name": name},
        **{"y": [places[number] for places, _ in placed], "line": {"color": colour, "width": 2.5}},
        **{"marker": {"color": colour, "size": 6}, "customdata": [number] * len(axes), "connectgaps": True},
        "hovertemplate": f"<b>run {name}</b><br>{facts}<extra></extra>",
    }


def _placed(values: Sequence[Any]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Return the height of each value between 0 and 1, and (height, text) of the ticks of its axis."""
    numbers = numbers_of(values)
    if numbers is None:
        kinds = sorted({str(value) for value in values if value is not None})
        height = {kind: (n + 0.5) / len(kinds) for n, kind in enumerate(kinds)}
        return [None if v is None else height[str(v)] for v in values], [(h, k) for k, h in height.items()]
    known = sorted({number for number in numbers if math.isfinite(number)})
    if not known:
        return [None] * len(values), []
    low, span = known[0], known[-1] - known[0]
    ticks = known if len(known) <= MOST_TICKS else [low + span * n / 4 for n in range(5)]
    where = {number: (number - low) / span if span else 0.5 for number in {*known, *ticks}}
    apart = [tick for n, tick in enumerate(ticks) if n == 0 or where[tick] - where[ticks[n - 1]] > 0.06]
    return [where.get(number) for number in numbers], [(where[tick], _show(tick)) for tick in apart]


def _ticks(x: int, marks: Sequence[tuple[float, str]]) -> list[Chart]:
    return [_text(x, height, f" {text}", "left") for height, text in marks]


def _text(x: float, y: float, text: str, anchor: str) -> Chart:
    place: Mapping[str, Any] = {"x": x, "y": y, "text": text, "xanchor": anchor, "yanchor": "middle"}
    return {**place, "showarrow": False, "font": {"size": 11, "color": "$soft"}, "bgcolor": "$halo"}


def _show(value: Any) -> str:
    """Return a value as short text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _colour(scores: Sequence[float], number: int) -> str:
    """Return a colour of the scale by the rank of a run's score; grey without a score."""
    known = sorted({score for score in scores if math.isfinite(score)})
    if not math.isfinite(scores[number]):
        return DENSE
    rank = known.index(scores[number]) / max(len(known) - 1, 1)
    return SCALE[round(rank * (len(SCALE) - 1))]
