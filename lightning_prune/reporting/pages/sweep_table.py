"""The table of a page of several runs, whose columns can be sorted."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning_prune.reporting.pages.sweep_charts import SIZES, numbers_of
from lightning_prune.reporting.run_folder import PAGE, Summary
from lightning_prune.reporting.scores import Metric
from lightning_prune.utils.formatting import si

__all__ = ["SweepRun", "link", "setting_of", "short_key", "table_of"]


@dataclass(frozen=True)
class SweepRun:
    """One of the runs of a page.

    Attributes:
        folder: of the run.
        summary: its results.
        settings: key -> value, of the keys in which the runs differ.
    """

    folder: Path
    summary: Summary
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether it has sizes and scores."""
        return self.summary.status == "completed" and self.summary.final is not None

    def size(self, name: str) -> float:
        """Return a size of the final network; NaN if there is none."""
        value = getattr(self.summary.final, name, None)
        return math.nan if value is None else float(value)

    def share(self, name: str) -> float:
        """Return a size in per cent of that of the dense network; NaN if there is none."""
        dense = getattr(self.summary.dense, name, None)
        return 100 * self.size(name) / dense if dense else math.nan


def setting_of(value: Any) -> Any:
    """Return the value of a setting; None for a run that lacks it."""
    return None if value in ("-", "", None) else value


def short_key(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a key, or the last two if another key or a result has this name."""
    last = key.rpartition(".")[2]
    if last in SIZES:
        return ".".join(key.split(".")[-2:])
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def table_of(
    runs: Sequence[SweepRun], names: Sequence[str], score: Metric | None, chosen: Container[int], here: Path
) -> dict[str, Any]:
    """Return titles and rows of the completed runs.

    Args:
        runs: all runs, whose settings have the same keys.
        names: of the runs.
        score: shown on the validation and the test set.
        chosen: numbers of the runs that are marked.
        here: folder of the page, for links.
    """
    heads = _heads(runs, score)
    rows = [
        _row(number, run, names[number], score, number in chosen, here, heads)
        for number, run in enumerate(runs)
        if run.done
    ]
    return {"heads": heads, "rows": rows}


def _heads(runs: Sequence[SweepRun], score: Metric | None) -> list[dict[str, Any]]:
    """Return the columns of the table: title, key, and whether it is aligned to the left."""
    keys = list(runs[0].settings) if runs else []
    texts = [numbers_of([setting_of(run.settings.get(key)) for run in runs]) is None for key in keys]
    columns = [{"name": "run", "key": "run", "text": True}]
    columns += [
        {"name": short_key(k, keys), "key": f"={k}", "text": text}
        for k, text in zip(keys, texts, strict=True)
    ]
    columns.append({"name": "seed", "key": "seed", "text": False})
    if score is not None:
        columns += [
            {"name": f"{stage} {score.label}", "key": stage, "text": False}
            for stage in ("validation", "test")
        ]
    for size, title in SIZES.items():
        # The size of the file says the same as the number of parameters; the chart has it.
        if size != "bytes" and any(math.isfinite(run.size(size)) for run in runs):
            columns.append({"name": title.partition(" in ")[0], "key": f"size {size}", "text": False})
            columns.append({"name": f"{title.partition(' in ')[0]} %", "key": f"share {size}", "text": False})
    return columns


def _row(
    number: int,
    run: SweepRun,
    name: str,
    score: Metric | None,
    chosen: bool,
    here: Path,
    heads: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    cells = [{**_cell(run, name, head["key"], score), "text": head["text"], "link": ""} for head in heads]
    if (run.folder / PAGE).is_file():
        cells[0]["link"] = link(run.folder / PAGE, here)
    return {"number": number, "front": chosen, "cells": cells}


def _cell(run: SweepRun, name: str, key: str, score: Metric | None) -> dict[str, str]:
    """Return what a cell shows, and the value that it is sorted by: a number, a text, or nothing."""
    kind, _, size = key.partition(" ")
    if key == "run":
        return {"shown": name, "value": name}
    if key.startswith("="):
        text = str(run.settings.get(key[1:], "-"))
        return {"shown": text, "value": "" if text == "-" else text}
    if key == "seed":
        return {"shown": str(run.summary.seed), "value": str(run.summary.seed)}
    if kind == "size":
        return _number(run.size(size), "ms" if size == "latency_ms" else "B" if size == "bytes" else "")
    if kind == "share":
        share = run.share(size)
        return {"shown": f"{share:.1f}", "value": repr(share)} if math.isfinite(share) else _nothing()
    value = math.nan if score is None else getattr(score, kind)(run.summary)
    return {"shown": f"{value:.4f}", "value": repr(value)} if math.isfinite(value) else _nothing()


def _number(value: float, unit: str) -> dict[str, str]:
    if not math.isfinite(value):
        return _nothing()
    shown = f"{value:.3g} ms" if unit == "ms" else si(value, 3, " ", unit)
    return {"shown": shown, "value": repr(value)}


def _nothing() -> dict[str, str]:
    return {"shown": "-", "value": ""}


def link(target: Path, here: Path) -> str:
    """Return a link from a page in the folder ``here``."""
    return quote(Path(os.path.relpath(target, here)).as_posix())
