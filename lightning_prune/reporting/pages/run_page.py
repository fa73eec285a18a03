"""The page of a run: ``report.html``."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from omegaconf import OmegaConf

from lightning_prune.graph.summary import NetworkSummary
from lightning_prune.graph.summary_text import change
from lightning_prune.reporting.comparison import place_of
from lightning_prune.reporting.pages.charts import (
    Chart,
    change_chart,
    channels_chart,
    class_chart,
    latency_chart,
    learning_rate_chart,
    loss_chart,
    score_chart,
    sizes_chart,
)
from lightning_prune.reporting.pages.confusion import confusion_of
from lightning_prune.reporting.pages.example_pictures import gallery
from lightning_prune.reporting.pages.load_code import load_code
from lightning_prune.reporting.pages.notices import notices_of
from lightning_prune.reporting.pages.render import write_page
from lightning_prune.reporting.pages.run_files import RunFiles
from lightning_prune.reporting.run_folder import PAGE, Summary
from lightning_prune.reporting.scores import Metric, curve, metric_of
from lightning_prune.utils.formatting import si

__all__ = ["write_run_page"]

LAYERS_NOTE = "The latency of a layer is that of its operators alone; how it was measured is said below."
SIZES = {"macs": ("MACs", ""), "params": ("parameters", ""), "bytes": ("file size", "B")}


def write_run_page(
    run: RunFiles, path: Path | None = None, baseline: RunFiles | None = None, metric: str | None = None
) -> Path:
    """Write the page of a run, and return its path.

    Args:
        run: the content of its folder.
        path: of the page; None: ``report.html`` in the folder.
        baseline: a dense run on the same data, shown beside it.
        metric: the score, as :func:`~lightning_prune.reporting.scores.metric_of` takes it.

    Raises:
        ValueError: no run has logged the metric.
    """
    summaries = [run.summary] + ([] if baseline is None else [baseline.summary])
    score = metric_of(summaries, metric)
    run = run if baseline is None else _beside(run, baseline)
    return write_page(path or run.folder / PAGE, "run.html", **_values(run, score, baseline))


def _beside(run: RunFiles, baseline: RunFiles) -> RunFiles:
    """Return the run with the outputs of the dense run on the same images, if there are any."""
    own, other = run.examples, baseline.examples
    if own is None or other is None or not own.shows_same_images(other):
        note = f"The example images of {baseline.name} are others, or missing: its outputs are not shown."
        return replace(run, notes=(*run.notes, note)) if own is not None else run
    return replace(run, examples=own.with_dense(other.outputs["final"]))


def _values(run: RunFiles, score: Metric | None, baseline: RunFiles | None) -> dict[str, Any]:
    """Return the values of the variables of the template."""
    summary, dense = run.summary, None if baseline is None else baseline.summary
    curves = _curves(run, score, dense)
    panels = None if run.examples is None else gallery(run.examples, summary.pruned)
    values: dict[str, Any] = {
        "title": _title(run),
        "kicker": f"run {run.name}",
        "lead": _lead(run, score),
        "notices": notices_of(run, score),
        "cards": _cards(summary, score, dense),
        "curves": curves,
        "curves_note": _curves_note(summary),
        "confusion": confusion_of(run, dense),
        "panels": panels,
        "why_no_examples": run.why_no_examples if summary.status == "completed" else "",
        "channels": None if run.layers is None else channels_chart(run.layers),
        "channels_note": "before and after pruning" if summary.pruned else "",
        "layers": None if run.layers is None else Markup(run.layers.html()),
        "layers_note": LAYERS_NOTE if run.layers is not None and "latency" in run.layers.totals else "",
        "latency": _latency(run),
        "load": _load(run),
        "settings": [*summary.overrides.items()],
        "command": _command(run),
        "config": OmegaConf.to_yaml(OmegaConf.create(dict(run.config))) if run.config else "",
        "traceback": run.traceback,
    }
    return {**values, "sections": _sections(values)}


def _sections(values: dict[str, Any]) -> list[tuple[str, str]]:
    names = {
        "curves": ("curves", "training"),
        "classes": ("confusion", "classes"),
        "examples": ("panels", "images"),
        "layers": ("layers", "layers"),
        "latency": ("latency", "latency"),
        "load": ("load", "load it"),
        "configuration": ("config", "configuration"),
        "error": ("traceback", "error"),
    }
    return [(anchor, name) for anchor, (key, name) in names.items() if values[key]]


def _title(run: RunFiles) -> str:
    """Return what was trained on what: ``Unet on BrainSlices``."""
    net, data = (_class_of(run.config.get(group)) for group in ("net", "data"))
    return " on ".join(filter(None, [net, data])) or f"Run {run.folder.name}"


def _class_of(group: Any) -> str:
    target = str(group.get("_target_", "")) if isinstance(group, dict) else ""
    name = target.rpartition(".")[2]
    detail = group.get("encoder_name") if isinstance(group, dict) else None
    return f"{name} ({detail})" if detail else name


def _lead(run: RunFiles, score: Metric | None) -> str:
    """Return the story in a sentence or two."""
    summary = run.summary
    time = f" in {_duration(summary.seconds)}" if summary.seconds else ""
    text = f"Trained for {summary.epochs} epoch{'s' * (summary.epochs != 1)}{time}"
    if summary.pruned and summary.dense and summary.final:
        share = summary.final.macs / summary.dense.macs
        number = len(summary.cuts)
        text += f" and pruned meanwhile, in {number} cut{'s' * (number != 1)}, to {share:.1%} of its MACs"
    if score is not None and math.isfinite(value := score.test(summary)):
        text += f". Its {score.label} on the test set is {value:.3f}"
    return f"{text}." if summary.epochs else ""


def _duration(seconds: float) -> str:
    """Return seconds for people.

    Example:
        >>> _duration(12.4), _duration(3700)
        ('12 s', '1 h 2 min')
    """
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _cards(summary: Summary, score: Metric | None, baseline: Summary | None) -> list[dict[str, Any]]:
    """Return the headline figures: score and sizes, before and after."""
    cards = [] if score is None else [_score_card(summary, score, baseline)]
    if summary.dense is None or summary.final is None:
        return cards
    for name, (label, unit) in SIZES.items():
        before, after = getattr(summary.dense, name), getattr(summary.final, name)
        cards.append(_card(label, si(before, 3, " ", unit), si(after, 3, " ", unit), before, after))
    before, after = summary.dense.latency_ms, summary.final.latency_ms
    if before and after:
        cards.insert(3, _card("latency", f"{before:.3g} ms", f"{after:.3g} ms", before, after))
    return cards


def _card(label: str, before: str, after: str, low: float, high: float) -> dict[str, Any]:
    if low == high:
        return {"label": label, "value": after, "share": None, "note": "", "left": ""}
    share = 100 * high / low if low else 0.0
    note = f"{share:.0f} % of {before}"
    return {"label": label, "value": after, "share": f"{min(share, 100):.0f}", "note": note, "left": note}


def _score_card(summary: Summary, score: Metric, baseline: Summary | None) -> dict[str, Any]:
    """Return the score on the test set; below it that of the dense run, or what is known from validation."""
    test, validation, before = score.test(summary), score.validation(summary), score.before_first_cut(summary)
    shown, where = (test, "test") if math.isfinite(test) else (validation, "validation")
    value = f"{shown:.3f}" if math.isfinite(shown) else "-"
    note = f"validation {validation:.3f}" if where == "test" and math.isfinite(validation) else ""
    if math.isfinite(before) and math.isfinite(validation):
        at = _last_epoch(summary, score)
        note = f"validation {before:.3f} before the first cut, {validation:.3f} {at or 'at the end'}"
    elif where == "validation" and (at := _last_epoch(summary, score)):
        note = at
    dense = math.nan if baseline is None else getattr(score, where)(baseline)
    if math.isfinite(dense) and math.isfinite(shown):
        note = f"{shown - dense:+.3f} from the dense run's {dense:.3f}"
    return {"label": f"{where} {score.label}", "value": value, "share": None, "note": note, "left": ""}


def _last_epoch(summary: Summary, score: Metric) -> str:
    """Return the epoch of the last score that is a number, if later ones are none; else nothing."""
    if score.name in summary.val:
        return ""
    epochs, values = curve(summary, f"val/{score.name}")
    known = [epoch for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
    return f"in epoch {known[-1]}, the last with a number" if known and known[-1] != epochs[-1] else ""


def _curves(run: RunFiles, score: Metric | None, baseline: Summary | None) -> list[dict[str, Any]]:
    summary = run.summary
    prune = run.config.get("prune")
    budget = (
        prune.get("budget") if isinstance(prune, dict) and isinstance(prune.get("budget"), dict) else None
    )
    charts: list[tuple[str, str, Chart | None]] = [
        ("Score", "", None if score is None else score_chart(summary, score, baseline)),
        ("Loss", "", None if score is not None and score.name == "loss" else loss_chart(summary)),
        ("Size", "", sizes_chart(summary, budget)),
        ("Change at each cut", "share of the variance of the outputs", change_chart(summary)),
        ("Each class", "validation", class_chart(summary)),
        ("Learning rate", "at the start of each epoch", learning_rate_chart(summary)),
    ]
    return [{"title": title, "note": note, "chart": chart} for title, note, chart in charts if chart]


def _curves_note(summary: Summary) -> str:
    if not summary.pruned:
        return "Over the epochs of training."
    return (
        "Over the epochs of training; dotted lines are cuts. Scores are measured before the cut of their epoch, "
        "sizes after it."
    )


def _latency(run: RunFiles) -> dict[str, Any] | None:
    """Return the measured latency of both networks, and of their layers; None if nothing was measured."""
    summary = run.summary
    before, after = (getattr(sizes, "latency_ms", None) for sizes in (summary.dense, summary.final))
    layers = {} if run.layers is None else _layer_latency(run.layers)
    if not before or not after:
        return {"note": "", "bars": [], **layers} if layers.get("layers") else None
    note = f"Median of one image at a time on {place_of(summary.threads, summary.device)}"
    rows = [("network", after, "")]
    if summary.pruned and summary.dense and summary.final:
        rows = [("dense", before, "dense"), ("pruned", after, "")]
        macs = summary.final.macs / summary.dense.macs
        left = f"{after / before:.0%} of the time is left, with {macs:.0%} of the MACs"
        note += f", both networks measured in turns. {left}"
    slowest = max(ms for _, ms, _ in rows)
    bars = [(name, f"{ms:.2f} ms", f"{100 * ms / slowest:.0f}", css) for name, ms, css in rows]
    return {"note": f"{note}.", "bars": bars, "layers": None, "how": "", "others": "", **layers}


def _layer_latency(layers: NetworkSummary) -> dict[str, Any]:
    """Return the chart of the latency of layers with its texts."""
    others = layers.others.get("latency")
    text = f"norms and other operators: {change('latency', others, layers.cut)}" if others else ""
    return {"layers": latency_chart(layers), "how": _how(layers), "others": text}


def _how(layers: NetworkSummary) -> str:
    """Return how the layers were timed, and why their sum is less than the latency of the network."""
    total = layers.totals.get("latency")
    if total is None:
        return layers.measured
    together = change("latency", total, layers.cut)
    return f"{layers.measured} Together {together}, without the time that Python takes between operators."


def _load(run: RunFiles) -> Sequence[dict[str, str]]:
    """Return code that loads the network, and the commands for what people do next."""
    net = run.config.get("net")
    if not run.has_net or not isinstance(net, dict):
        return []
    folder = shlex.quote(str(run.folder))
    return [
        {"text": "In Python, also elsewhere with a copy of net.pt:", "code": load_code(net, run.folder)},
        {"text": "As ONNX:", "code": f"lightning-prune export {folder} net.onnx"},
    ]


def _command(run: RunFiles) -> str:
    """Return the command line of the run."""
    words = [f"{key}={value}" if value else f"~{key}" for key, value in run.summary.overrides.items()]
    if not run.config or "weights" in run.summary.overrides:  # a run of `lightning-prune prune`
        return ""
    return shlex.join(["lightning-prune", *words])
