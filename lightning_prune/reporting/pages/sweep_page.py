"""The page of several runs: ``sweep.html`` of a sweep, ``compare.html`` of named runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_prune.reporting.pages.render import plotly_script, write_page
from lightning_prune.reporting.pages.sweep_charts import SIZES, Axis, front, parallel_chart, pareto_chart
from lightning_prune.reporting.pages.sweep_table import SweepRun, link, setting_of, short_key, table_of
from lightning_prune.reporting.run_folder import ERROR, Summary
from lightning_prune.reporting.scores import Metric, metric_of
from lightning_prune.utils.formatting import counted

__all__ = ["write_sweep_page"]

STAGES = {"test": "test set", "validation": "validation set"}
MOST_LINES = 1000  # runs in parallel coordinates
SHARES = {"macs": "MACs %", "params": "parameters %", "latency_ms": "latency %"}
ERROR_LINES = 12


def write_sweep_page(
    runs: Sequence[SweepRun],
    path: Path,
    title: str,
    command: str = "",
    metric: str | None = None,
    against: str = "macs",
) -> Path:
    """Write the page of several runs, and return its path.

    Args:
        runs: in the order of the page.
        path: of the page; links to the pages of the runs are relative to it.
        title: of the page.
        command: that made the runs.
        metric: the score, as :func:`~lightning_prune.reporting.scores.metric_of` takes it.
        against: the size that the Pareto front shows first: a key of ``SIZES``.

    Raises:
        ValueError: no run has logged the metric, or ``against`` is none of the sizes.
    """
    if against not in SIZES:
        raise ValueError(f"against must be one of {', '.join(SIZES)}, got {against!r}")
    score = metric_of([run.summary for run in runs], metric)
    names = _names(runs)
    values = _values(runs, names, score, against, path.parent)
    return write_page(path, "sweep.html", title=title, kicker=str(path.parent), command=command, **values)


def _names(runs: Sequence[SweepRun]) -> list[str]:
    """Return short names that differ: those of the folders, with the ones around them where needed."""
    for depth in range(1, 6):
        names = ["/".join(run.folder.resolve().parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def _values(
    runs: Sequence[SweepRun], names: Sequence[str], score: Metric | None, against: str, here: Path
) -> dict[str, Any]:
    """Return the values of the variables of the template."""
    done = [number for number, run in enumerate(runs) if run.done]
    pareto = None if score is None else _pareto(runs, names, score, against)
    chosen = set() if score is None else set(_front(runs, score, against))
    values: dict[str, Any] = {
        "lead": _lead(runs, names, score, done),
        "notices": _notices(runs, score),
        "pareto": pareto,
        "parallel": _parallel([runs[n] for n in done], [names[n] for n in done], score)
        if plotly_script()
        else None,
        **table_of(runs, names, score, chosen, here),
        "table_note": "A click on a title sorts. The bar at the left marks runs of the Pareto front."
        if chosen
        else "A click on a title sorts.",
        "failures": [
            _failure(run, name, here) for run, name in zip(runs, names, strict=True) if not run.done
        ],
    }
    return {**values, "sections": _sections(values)}


def _sections(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {
        "front": ("pareto", "score against size"),
        "settings": ("parallel", "settings"),
        "runs": ("rows", "runs"),
        "failures": ("failures", "not completed"),
    }
    return [(anchor, name) for anchor, (key, name) in names.items() if values[key]]


def _lead(runs: Sequence[SweepRun], names: Sequence[str], score: Metric | None, done: Sequence[int]) -> str:
    """Return how many runs there are, and which is the best one on the validation set."""
    text = f"{len(runs)} run{'s' * (len(runs) != 1)}, {len(done)} completed."
    values = {n: _by(score, runs[n].summary) for n in done} if score is not None else {}
    known = [n for n, value in values.items() if math.isfinite(value)]
    if score is None or not known:
        return text
    best = (max if score.higher_is_better else min)(known, key=values.__getitem__)
    test = score.test(runs[best].summary)
    tested = f" (on the test set {test:.3f})" if math.isfinite(test) else ""
    return f"{text} Best {score.label} by validation: {values[best]:.3f} of run {names[best]}{tested}."


def _by(score: Metric, summary: Summary) -> float:
    """Return the value to choose a run by: that on the validation set, that on the test set if there is no other."""
    value = score.validation(summary)
    return value if math.isfinite(value) else score.test(summary)


def _notices(runs: Sequence[SweepRun], score: Metric | None) -> list[tuple[str, str]]:
    done = [run.summary for run in runs if run.done]
    if not done:
        return [("bad", "No run was completed, so there is nothing to compare; the errors are below.")]
    if score is None:
        return [
            ("", "No run has logged a metric of a validation or test set, so there is no score to compare.")
        ]
    notices = []
    if not any(math.isfinite(score.validation(summary)) for summary in done):
        notices.append(
            ("", f"No run has a {score.label} on a validation set: runs are chosen by the test set.")
        )
    without = [run.folder.name for run in runs if run.done and math.isnan(_by(score, run.summary))]
    if without:
        notices.append(
            ("", f"Without a {score.label}, or with one that is not a number: {', '.join(without)}.")
        )
    return notices


def _front(runs: Sequence[SweepRun], score: Metric, size: str) -> list[int]:
    """Return the numbers of the completed runs of the front, chosen by validation."""
    sizes = [run.size(size) if run.done else math.nan for run in runs]
    return front(sizes, [_by(score, run.summary) for run in runs], score.higher_is_better)


def _pareto(
    runs: Sequence[SweepRun], names: Sequence[str], score: Metric, against: str
) -> dict[str, Any] | None:
    """Return a chart for each size and each set of images, and what the choices are called."""
    stages = [
        stage
        for stage in STAGES
        if any(run.done and math.isfinite(getattr(score, stage)(run.summary)) for run in runs)
    ]
    sizes = [size for size in SIZES if any(run.done and math.isfinite(run.size(size)) for run in runs)]
    if not stages or not sizes:
        return None
    done = [run if run.done else None for run in runs]
    variants = {
        f"{size}/{stage}": pareto_chart(
            names,
            [math.nan if run is None else run.size(size) for run in done],
            [math.nan if run is None else getattr(score, stage)(run.summary) for run in done],
            _front(runs, score, size),
            (SIZES[size], f"{score.label}, {STAGES[stage]}"),
            joined=stage == "validation",
        )
        for size in sizes
        for stage in stages
    }
    return {
        "variants": variants,
        "sizes": [(size, SIZES[size]) for size in sizes],
        "stages": [(stage, f"{score.label} on the {STAGES[stage]}") for stage in stages],
        "against": against if against in sizes else sizes[0],
        "note": f"Blue runs are on the Pareto front: no other run is smaller and as good. They are chosen by the "
        f"{score.label} on the validation set; what the test set says of them is shown, and decides nothing."
        if "validation" in stages
        else "Blue runs are on the Pareto front: no other run is smaller and as good.",
    }


def _parallel(runs: Sequence[SweepRun], names: Sequence[str], score: Metric | None) -> dict[str, Any] | None:
    """Return parallel coordinates of settings, sizes and scores."""
    keys = list(runs[0].settings) if runs else []
    axes: list[Axis] = [
        (short_key(key, keys), [setting_of(run.settings[key]) for run in runs]) for key in keys
    ]
    seeds = [run.summary.seed for run in runs]
    if len(set(seeds)) > 1:
        axes.append(("seed", seeds))
    for size, title in SHARES.items():
        shares = [run.share(size) for run in runs]
        if len({round(share, 1) for share in shares if math.isfinite(share)}) > 1:
            axes.append((title, shares))
    scores = [math.nan if score is None else _by(score, run.summary) for run in runs]
    if score is not None:
        columns = [(f"validation {score.label}", [score.validation(run.summary) for run in runs])]
        columns.append((f"test {score.label}", [score.test(run.summary) for run in runs]))
        axes += [(title, values) for title, values in columns if any(map(math.isfinite, values))]
    return parallel_chart(names[:MOST_LINES], [(t, v[:MOST_LINES]) for t, v in axes], scores[:MOST_LINES])


def _failure(run: SweepRun, name: str, here: Path) -> dict[str, str]:
    lines = (run.summary.error or "there is no message").splitlines()
    more = [f"... and {counted(len(lines) - ERROR_LINES, 'more line')}"] if len(lines) > ERROR_LINES else []
    return {
        "name": f"run {name}",
        "status": run.summary.status,
        "settings": ", ".join(f"{key}={value}" for key, value in run.settings.items()),
        "error": "\n".join([*lines[:ERROR_LINES], *more]),
        "link": link(run.folder / ERROR, here) if (run.folder / ERROR).is_file() else "",
    }
