"""Runs in groups that differ in their seeds only: mean and standard deviation of each, as a table and as files."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_prune.cli.config import load_config
from lightning_prune.reporting.pages.sweep_table import SweepRun
from lightning_prune.reporting.run_folder import CONFIG, Summary
from lightning_prune.utils.atomic import atomic_write, write_text
from lightning_prune.utils.metrics import SCORE_LABELS
from lightning_prune.utils.objectives import SIZES
from lightning_prune.utils.tables import NOTHING, Table

__all__ = ["CAPTION", "Group", "failures", "group_runs", "setting", "sweep_runs", "table", "write"]

COLUMNS = {  # heading -> name of a value of a run, in per cent if the heading has a %
    "MACs %": "macs",
    "params %": "params",
    "file %": "bytes",
    "latency %": "latency_ms",
    **{f"test {label}": name for name, label in SCORE_LABELS.items()},
    **{f"val {label}": f"val/{name}" for name, label in SCORE_LABELS.items()},
}
LONG_NUMBER = re.compile(r"-?\d+\.\d{6,}(e-?\d+)?")
CAPTION = (
    "Mean ± sample standard deviation over seeds. Sizes and latency in per cent of the dense network; latency "
    "of one image, measured in the run, in turns with the dense network."
)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        settings: key -> value, for the keys in which the groups differ.
        runs: folder -> summary.
    """

    settings: Mapping[str, str]
    runs: Mapping[Path, Summary]

    @property
    def completed(self) -> list[Summary]:
        """The runs that did not fail and are finished."""
        return [summary for summary in self.runs.values() if summary.status == "completed"]

    def values(self, name: str) -> list[float]:
        """Return the value ``name`` of :func:`run_values` for each completed run, without runs that lack it."""
        values = (run_values(summary).get(name) for summary in self.completed)
        return [value for value in values if value is not None and not math.isnan(value)]


def run_values(summary: Summary) -> dict[str, float]:
    """Return sizes and latency as a percentage of the dense network's, and the scores on the test set, by name.

    Without a test set, the scores are those of the final network on the validation set, as ``val/miou``. Objectives
    have their own names, without sizes, which are there in per cent.
    """
    stage, scores = summary.scores
    values = {name if stage == "test" else f"{stage}/{name}": value for name, value in scores.items()}
    for name in ("macs", "params", "bytes", "latency_ms"):
        before, after = getattr(summary.dense, name, None), getattr(summary.final, name, None)
        if before and after:
            values[name] = 100 * after / before
    return {**_objectives(summary), **values}


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; NaN if there are too few values.

    Example:
        >>> mean_spread([1.0, 2.0, 3.0]), mean_spread([1.0])
        ((2.0, 1.0), (1.0, nan))
    """
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def setting(folder: Path, summary: Summary, key: str) -> str:
    """Return the value of a key in a run: from the command line, the chosen options, or the configuration.

    A dash if none of them has the key.
    """
    if key in summary.overrides:
        return summary.overrides[key]
    if key in summary.choices:
        return summary.choices[key]
    if not (folder / CONFIG).is_file():
        return NOTHING
    value = OmegaConf.select(load_config(folder), key)
    return NOTHING if value is None else str(value)


def group_runs(runs: Mapping[Path, Summary]) -> list[Group]:
    """Group runs that differ in their seed only; the groups are in the order of their first runs."""
    keys = dict.fromkeys(key for summary in runs.values() for key in summary.overrides if key != "seed")
    values = {folder: {key: setting(folder, run, key) for key in keys} for folder, run in runs.items()}
    varying = [key for key in keys if len({settings[key] for settings in values.values()}) > 1]
    groups: dict[tuple[str, ...], dict[Path, Summary]] = {}
    for folder, summary in runs.items():
        groups.setdefault(tuple(values[folder][key] for key in varying), {})[folder] = summary
    return [Group(dict(zip(varying, settings, strict=True)), members) for settings, members in groups.items()]


def table(groups: Sequence[Group], here: Path | None = None) -> Table:
    """Return a table with one row per group, and the columns for which there are values.

    Args:
        groups: of runs.
        here: a folder: a first column names the folders of the runs as seen from it, and a column of checkpoints,
            which would tell runs apart that were resumed, is left out; None: runs are known by their settings.
    """
    keys = [key for key in (groups[0].settings if groups else ()) if here is None or key != "ckpt_path"]
    columns = _columns(groups)
    first = ["run"] if here is not None else [] if keys else ["runs"]
    rows = []
    for group in groups:
        names = [", ".join(os.path.relpath(run, here) for run in group.runs)] if here is not None else []
        settings = [_rounded(group.settings[key]) for key in keys]
        rows.append(
            [*names, *(settings or ([] if names else ["all"])), _count(group), *_cells(group, columns)]
        )
    return Table([*first, *keys, "seeds", *columns], rows, left=len(first) + len(keys))


def _columns(groups: Sequence[Group]) -> dict[str, str]:
    """Return heading -> name of the values that the runs have, with the objectives that no other column shows."""
    runs = [run for group in groups for run in group.completed]
    others = [name for run in runs for name in _objectives(run) if name not in COLUMNS.values()]
    columns = {**COLUMNS, **{name: name for name in others}}
    return {heading: name for heading, name in columns.items() if any(group.values(name) for group in groups)}


def _objectives(run: Summary) -> dict[str, float]:
    """Return the objectives of a run that are no sizes; none if nothing searches and it has the default only."""
    scores = [name for name in run.objective if name.removeprefix("val/") in SCORE_LABELS]
    is_default = len(run.objective) == len(scores) == 1
    if is_default and run.choices.get("hydra/sweeper", "basic") == "basic":
        return {}
    return {name: value for name, value in run.objective.items() if name not in SIZES}


def _rounded(value: str) -> str:
    """Return the text of a number for people: a search proposes more digits than anybody reads.

    Example:
        >>> _rounded("0.006380556092044457"), _rounded("0.5"), _rounded("[0.1,0.2]"), _rounded("12345678")
        ('0.0063806', '0.5', '[0.1,0.2]', '12345678')
    """
    return f"{float(value):.5g}" if LONG_NUMBER.fullmatch(value) else value


def _count(group: Group) -> str:
    completed, total = len(group.completed), len(group.runs)
    return str(completed) if completed == total else f"{completed} of {total}"


def _cells(group: Group, columns: Mapping[str, str]) -> list[str]:
    return [
        _cell(group.values(name), 4 if "/" in name or name in SCORE_LABELS else 1)
        for name in columns.values()
    ]


def _cell(values: Sequence[float], digits: int) -> str:
    mean, spread = mean_spread(values)
    if math.isnan(mean):
        return NOTHING
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def failures(runs: Mapping[Path, Summary]) -> list[str]:
    """Return one line for each run that failed or is unfinished."""
    unfinished = {folder: run for folder, run in runs.items() if run.status != "completed"}
    return [
        ": ".join(filter(None, [str(folder), run.status, run.error])) for folder, run in unfinished.items()
    ]


def write(groups: Sequence[Group], folder: Path, command: str = "", here: Path | None = None) -> None:
    """Write ``sweep.md`` and ``sweep.json`` (one entry per group), and ``sweep.csv`` (one row per run).

    Args:
        groups: of runs.
        folder: to write into.
        command: that made the runs, as a heading.
        here: as of :func:`table`.
    """
    heading = [f"`{command}`"] if command else []
    lines = [line for group in groups for line in failures(group.runs)]
    paragraphs = [*heading, table(groups, here).markdown(), CAPTION, *lines]
    write_text(folder / "sweep.md", "\n\n".join(paragraphs) + "\n")
    write_text(folder / "sweep.json", json.dumps([_entry(group) for group in groups], indent=1) + "\n")
    _write_csv(folder / "sweep.csv", groups)


def _entry(group: Group) -> dict[str, Any]:
    names = dict.fromkeys(name for summary in group.completed for name in run_values(summary))
    stats = {name: mean_spread(group.values(name)) for name in names}
    return {
        "settings": dict(group.settings),
        "runs": [str(folder) for folder in group.runs],
        "completed": len(group.completed),
        "mean": {name: None if math.isnan(mean) else mean for name, (mean, _) in stats.items()},
        "spread": {name: None if math.isnan(spread) else spread for name, (_, spread) in stats.items()},
    }


def _write_csv(path: Path, groups: Sequence[Group]) -> None:
    rows = [
        {"run": folder, **group.settings, "seed": run.seed, "status": run.status, **run_values(run)}
        for group in groups
        for folder, run in group.runs.items()
    ]
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), restval="")
        writer.writeheader()
        writer.writerows(rows)


def sweep_runs(groups: Iterable[Group]) -> list[SweepRun]:
    """Return the runs of all groups for their page."""
    return [SweepRun(folder, run, group.settings) for group in groups for folder, run in group.runs.items()]
