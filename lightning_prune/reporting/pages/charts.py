"""Charts of a run, as descriptions for plotly.js; colours are names that the page's style sheet defines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_prune.graph.summary import Change, NetworkSummary
from lightning_prune.reporting.run_folder import Summary
from lightning_prune.reporting.scores import Metric, curve

__all__ = [
    "Chart",
    "change_chart",
    "channels_chart",
    "class_chart",
    "latency_chart",
    "learning_rate_chart",
    "loss_chart",
    "score_chart",
    "sizes_chart",
]

Chart = dict[str, Any]
DENSE, PRUNED, ACCENT = "$dense", "$pruned", "$accent"
#: of classes and of resources, after Okabe and Ito; people with a colour weakness can tell them apart
SERIES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999933")
MOST_BARS = 60  # layers; of larger networks the outline is drawn
MOST_CLASSES = 12
MOST_EPOCHS = 12  # that each have a tick
MOST_OUTLINED = 300  # layers whose outline is a line; of more it would cover the area
RESOURCES = {"macs": "MACs", "params": "parameters", "latency": "latency"}


def _finite(values: Sequence[float]) -> list[float | None]:
    """Return numbers as JSON has them: a gap where there is none."""
    return [value if math.isfinite(value) else None for value in map(float, values)]


def line(x: Sequence[float], y: Sequence[float], name: str, colour: str, **more: Any) -> Chart:
    """Return a line with a marker at each point."""
    style = {"color": colour, "width": 2, **more.pop("line", {})}
    return {
        **{"type": "scatter", "mode": "lines+markers", "name": name, "x": list(x), "y": _finite(y)},
        **{"line": style, "marker": {"size": 5, "color": colour}, **more},
    }


def layout(y: str = "", x: str = "epochs trained", **more: Any) -> Chart:
    """Return the layout of a small chart with these titles of its axes."""
    axis = {"title": {"text": x}, **more.pop("xaxis", {})}
    return {"xaxis": axis, "yaxis": {"title": {"text": y}, **more.pop("yaxis", {})}, **more}


def _cuts(summary: Summary) -> list[Chart]:
    """Return a dotted vertical line for each epoch with a cut."""
    epochs = sorted({cut["epoch"] + 1 for cut in summary.cuts if cut.get("epoch") is not None})
    style = {"color": ACCENT, "width": 1, "dash": "dot"}
    faint = {"type": "line", "xref": "x", "yref": "paper", "opacity": 0.6, "line": style}
    return [{**faint, "x0": epoch, "x1": epoch, "y0": 0, "y1": 1} for epoch in epochs]


def _curves(summary: Summary, y: str, lines: Sequence[Chart], **more: Any) -> Chart | None:
    """Return a chart over the epochs, with its cuts; None if no line has a point."""
    drawn = [each for each in lines if any(value is not None for value in each["y"])]
    epochs = max((epoch for each in drawn for epoch in each["x"]), default=0)
    axis = {"dtick": 1} if epochs <= MOST_EPOCHS else {}  # else Plotly may put ticks between epochs
    more = {"shapes": _cuts(summary), "xaxis": axis, **more}
    return {"data": drawn, "layout": layout(y, **more)} if drawn else None


def score_chart(summary: Summary, metric: Metric, baseline: Summary | None = None) -> Chart | None:
    """Return the score over the epochs, measured before the cut of each epoch."""
    dense = [] if baseline is None else [line(*curve(baseline, f"val/{metric.name}"), "dense run", DENSE)]
    thin = {"dash": "dot", "width": 1.5}
    train = line(*curve(summary, f"train/{metric.name}"), "training", DENSE, line=thin, mode="lines")
    own = line(*curve(summary, f"val/{metric.name}"), "validation", PRUNED)
    return _curves(summary, metric.label, [*dense, train, own])


def loss_chart(summary: Summary) -> Chart | None:
    """Return the loss of training and validation over the epochs."""
    train = line(*curve(summary, "train/loss"), "training", DENSE)
    return _curves(summary, "loss", [train, line(*curve(summary, "val/loss"), "validation", PRUNED)])


def class_chart(summary: Summary, classes: Sequence[str] = ()) -> Chart | None:
    """Return the IoU of each class over the epochs."""
    names = dict.fromkeys(key for row in summary.curves for key in row if key.startswith("val/iou_"))
    lines = [
        line(*curve(summary, name), name.removeprefix("val/iou_"), SERIES[number % len(SERIES)])
        for number, name in enumerate([*names][:MOST_CLASSES])
    ]
    return _curves(summary, "IoU", lines)


def sizes_chart(summary: Summary, budget: Mapping[str, float] | None = None) -> Chart | None:
    """Return the share of each resource that is left over the epochs, and its budget."""
    names = dict.fromkeys(
        key.removeprefix("prune/").removesuffix("_share")
        for row in summary.curves
        for key in row
        if key.startswith("prune/") and key.endswith("_share")
    )
    lines, aims = [], []
    for number, name in enumerate(names):
        epochs, shares = curve(summary, f"prune/{name}_share")
        step = {"shape": "hv"}
        label, colour = RESOURCES.get(name, name), SERIES[number % len(SERIES)]
        lines.append(line([0, *epochs], [1.0, *shares], label, colour, line=step))
        if (aim := (budget or {}).get(name)) is not None and isinstance(aim, (int, float)) and aim <= 1:
            aims.append(_aim(float(aim), label, colour))
    chart = _curves(summary, "left of the dense network", lines, yaxis=_percent())
    if chart:
        chart["layout"]["shapes"] += [aim for aim, _ in aims]
        chart["layout"]["annotations"] = [text for _, text in aims]
    return chart


def _percent() -> Chart:
    return {"tickformat": ".0%", "rangemode": "tozero"}


def _aim(aim: float, label: str, colour: str) -> tuple[Chart, Chart]:
    """Return a dashed line at a budget, and its text."""
    where = {"xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": aim, "y1": aim}
    text = {"text": f"budget of {label}", "x": 0, "xref": "paper", "xanchor": "left", "y": aim}
    dashed = {"type": "line", **where, "line": {"color": colour, "width": 1, "dash": "dash"}}
    return dashed, {**text, "yanchor": "top", "showarrow": False, "font": {"size": 11, "color": "$soft"}}


def change_chart(summary: Summary) -> Chart | None:
    """Return how much each cut changed the outputs of the network, with and without its repair."""
    cuts = [cut for cut in summary.cuts if cut.get("change") is not None]
    if not cuts:
        return None
    names = [_moment(cut) for cut in cuts]
    series = [("without repair", "change_unrepaired", DENSE), ("repaired", "change", PRUNED)]
    bars = [
        {
            **{"type": "bar", "name": name, "x": names, "marker": {"color": colour}},
            **{
                "y": [_positive(cut.get(key)) for cut in cuts],
                "hovertemplate": "%{y:.2g}<extra>%{x}</extra>",
            },
        }
        for name, key, colour in series
    ]
    axis = {"type": "log", "dtick": 1, "exponentformat": "power"}
    return {"data": bars, "layout": layout("change of the outputs", "cut after", yaxis=axis, bargap=0.3)}


def _moment(cut: Mapping[str, Any]) -> str:
    step = cut.get("step")
    return f"epoch {cut.get('epoch', 0) + 1}" + ("" if step is None else f", step {step}")


def _positive(value: float | None) -> float | None:
    """Return a number that a logarithmic axis can show."""
    return value if value is not None and math.isfinite(value) and value > 0 else None


def learning_rate_chart(summary: Summary) -> Chart | None:
    """Return the learning rates at the start of each epoch."""
    names = dict.fromkeys(
        key for row in summary.curves for key in row if key == "lr" or key.startswith("lr/")
    )
    lines = [
        line(*curve(summary, name), name, PRUNED if number == 0 else SERIES[number % len(SERIES)])
        for number, name in enumerate(names)
    ]
    axis = {"exponentformat": "power", "rangemode": "tozero"}
    return _curves(summary, "learning rate", lines, yaxis=axis, showlegend=len(lines) > 1)


def channels_chart(layers: NetworkSummary) -> Chart | None:
    """Return the channels of each layer before and after, in the order of the network."""
    channels = {layer.name: layer.channels for layer in layers.layers}
    axis = {"tickformat": "d"}
    return _layers_chart(channels, layers.cut, "channels", "%{customdata}: %{y}<extra></extra>", axis)


def latency_chart(layers: NetworkSummary) -> Chart | None:
    """Return the milliseconds of each layer before and after."""
    times = {layer.name: layer.costs["latency"] for layer in layers.layers if "latency" in layer.costs}
    hover = "%{customdata}: %{y:.3g} ms<extra></extra>"
    return _layers_chart(times, layers.cut, "ms", hover, scale=1e-6)


def _layers_chart(
    values: Mapping[str, Change],
    cut: bool,
    title: str,
    hover: str,
    axis: Mapping[str, Any] | None = None,
    scale: float = 1,
) -> Chart | None:
    """Return narrow bars of the pruned network before wide ones of the dense one; of many layers, outlines."""
    if not values:
        return None
    before = [scale * change.before for change in values.values()]
    after = [scale * change.after for change in values.values()]
    series = (
        [("dense", before, DENSE, 0.86), ("pruned", after, PRUNED, 0.5)]
        if cut
        else [("", after, DENSE, 0.86)]
    )
    draw = _bars if len(values) <= MOST_BARS else _outline
    shared = {"customdata": [*values], "hovertemplate": hover}
    data = [
        {**draw(heights, colour, width), "name": name, **shared} for name, heights, colour, width in series
    ]
    hidden = {"showticklabels": False, "showgrid": False, "zeroline": False}
    places = {"xaxis": hidden, "yaxis": dict(axis or {}), "barmode": "overlay", "showlegend": cut}
    return {"data": data, "layout": layout(title, "layers, in order", **places)}


def _bars(values: Sequence[float], colour: str, width: float) -> Chart:
    places = list(range(1, len(values) + 1))
    return {"type": "bar", "y": list(values), "x": places, "width": width, "marker": {"color": colour}}


def _outline(values: Sequence[float], colour: str, width: float) -> Chart:
    places = list(range(1, len(values) + 1))
    style = {"color": colour, "width": 1 if len(values) <= MOST_OUTLINED else 0, "shape": "hvh"}
    return {
        "type": "scatter",
        "mode": "lines",
        "y": list(values),
        "x": places,
        "fill": "tozeroy",
        "line": style,
    }
