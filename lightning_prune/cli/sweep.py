"""One table over many runs: mean and spread over seeds, for each combination of the other settings (level 5).

A sweep ends with it. ``python -m lightning_prune.cli.sweep DIR [DIR ...] [--out DIR]`` makes it from any runs:
each ``DIR`` is the folder of a run or of a sweep.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lightning_prune.reporting.run_folder import CONFIG, Summary, find_runs
from lightning_prune.utils.tables import NOTHING, Table, show

__all__ = ["Group", "SweepTable", "group_runs", "main", "table", "write"]

FIGURES = {  # heading -> figure of a run, in per cent where the heading says so
    "MACs %": "macs",
    "params %": "params",
    "file %": "bytes",
    "latency %": "latency_ms",
    "test mIoU": "miou",
}
CAPTION = (
    "Mean ± sample standard deviation over seeds. Sizes and latency in per cent of the dense network; latency "
    "of one image, measured in the run, in turns with the dense network."
)


@dataclass(frozen=True)
class Group:
    """The runs that differ in their seed only.

    Attributes:
        settings: key -> value, for the keys in which the groups differ.
        runs: folder -> summary.
    """

    settings: Mapping[str, str]
    runs: Mapping[Path, Summary]

    @property
    def completed(self) -> list[Summary]:
        """The runs that came to their end."""
        return [summary for summary in self.runs.values() if summary.status == "completed"]

    def values(self, name: str) -> list[float]:
        """One figure of every completed run that has it."""
        found = (figures(summary).get(name) for summary in self.completed)
        return [value for value in found if value is not None and not math.isnan(value)]


def figures(summary: Summary) -> dict[str, float]:
    """Sizes as a percentage of the dense network's, and the scores on the test set."""
    found = dict(summary.test)
    for name in ("macs", "params", "bytes", "latency_ms"):
        before, after = getattr(summary.dense, name, None), getattr(summary.final, name, None)
        if before and after:
            found[name] = 100 * after / before
    return found


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few values.

    Example:
        >>> mean_spread([1.0, 2.0, 3.0]), mean_spread([1.0])
        ((2.0, 1.0), (1.0, nan))
    """
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def setting(folder: Path, summary: Summary, key: str) -> str:
    """What a key was in a run: as given, else the chosen option, else as composed; a dash if there is none."""
    if key in summary.overrides:
        return summary.overrides[key]
    if key in summary.choices:
        return summary.choices[key]
    if not (folder / CONFIG).is_file():
        return NOTHING
    value = OmegaConf.select(OmegaConf.load(folder / CONFIG), key)
    return NOTHING if value is None else str(value)


def group_runs(runs: Mapping[Path, Summary]) -> list[Group]:
    """Put runs together that differ in their seed only; the groups in the order of their first runs."""
    keys = dict.fromkeys(key for summary in runs.values() for key in summary.overrides if key != "seed")
    values = {folder: {key: setting(folder, run, key) for key in keys} for folder, run in runs.items()}
    varying = [key for key in keys if len({found[key] for found in values.values()}) > 1]
    groups: dict[tuple[str, ...], dict[Path, Summary]] = {}
    for folder, summary in runs.items():
        groups.setdefault(tuple(values[folder][key] for key in varying), {})[folder] = summary
    return [Group(dict(zip(varying, held, strict=True)), found) for held, found in groups.items()]


def table(groups: Sequence[Group]) -> Table:
    """One row per group."""
    keys = list(groups[0].settings) if groups else []
    shown = {heading: name for heading, name in FIGURES.items() if any(g.values(name) for g in groups)}
    header = [*(keys or ["runs"]), "seeds", *shown]
    rows = [[*(group.settings.values() or ["all"]), _count(group), *_cells(group, shown)] for group in groups]
    return Table(header, rows, left=max(1, len(keys)))


def _count(group: Group) -> str:
    done, all_ = len(group.completed), len(group.runs)
    return str(done) if done == all_ else f"{done} of {all_}"


def _cells(group: Group, shown: Mapping[str, str]) -> list[str]:
    return [_cell(group.values(name), 4 if name == "miou" else 1) for name in shown.values()]


def _cell(values: Sequence[float], digits: int) -> str:
    mean, spread = mean_spread(values)
    if math.isnan(mean):
        return NOTHING
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def failures(runs: Mapping[Path, Summary]) -> list[str]:
    """One line for each run that did not come to its end."""
    lost = ((folder, run) for folder, run in runs.items() if run.status != "completed")
    return [f"{folder}: {run.status}: {run.error}" for folder, run in lost]


def write(groups: Sequence[Group], folder: Path, command: str = "") -> None:
    """Write ``sweep.md`` and ``sweep.json`` (one entry per group), and ``sweep.csv`` (one row per run)."""
    lost = [line for group in groups for line in failures(group.runs)]
    text = [f"`{command}`"] * bool(command) + [table(groups).markdown(), CAPTION, *lost]
    (folder / "sweep.md").write_text("\n\n".join(text) + "\n")
    (folder / "sweep.json").write_text(json.dumps([_entry(group) for group in groups], indent=1) + "\n")
    _write_csv(folder / "sweep.csv", groups)


def _entry(group: Group) -> dict[str, Any]:
    names = dict.fromkeys(name for summary in group.completed for name in figures(summary))
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
        {"run": folder, **group.settings, "seed": run.seed, "status": run.status, **figures(run)}
        for group in groups
        for folder, run in group.runs.items()
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), restval="")
        writer.writeheader()
        writer.writerows(rows)


def summarise(folders: Iterable[str | Path], out: Path, command: str = "") -> list[str]:
    """Find the runs, print and write their table, and say which runs failed."""
    runs = find_runs(folders)
    groups = group_runs(runs)
    out.mkdir(parents=True, exist_ok=True)
    write(groups, out, command)
    lost = failures(runs)
    show(table(groups))
    print("\n".join([*lost, CAPTION, f"{out / 'sweep.md'} (also .csv, .json)"]), flush=True)
    return lost


class SweepTable(Callback):
    """Makes the table of a sweep when its last run has ended; a failed run makes the command fail."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the table."""
        folder = Path(config.hydra.sweep.dir)
        command = shlex.join(["lightning-prune", "-m", *config.hydra.overrides.task])
        if summarise([folder], folder, command):
            raise SystemExit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m lightning_prune.cli.sweep``."""
    parser = argparse.ArgumentParser(prog="python -m lightning_prune.cli.sweep", description=CAPTION)
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a run or of a sweep")
    parser.add_argument(
        "--out", metavar="DIR", help="where sweep.md, .csv and .json go; default: the first DIR"
    )
    given = parser.parse_args(arguments)
    try:
        summarise(given.folders, Path(given.out or given.folders[0]))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
