"""What the folder of a run holds, read for its page: what is missing or damaged is noted, and the rest is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightning_prune.graph.summary import NetworkSummary
from lightning_prune.reporting.csv_log import complete_rows
from lightning_prune.reporting.examples import Examples, NoExamples
from lightning_prune.reporting.layers import LAYERS, layers_of_widths, load_layers
from lightning_prune.reporting.run_folder import CONFIG, ERROR, NET, SUMMARY, Summary

__all__ = ["RunFiles", "read_run"]

METRICS = Path("csv", "metrics.csv")


@dataclass(frozen=True)
class RunFiles:
    """The content of the folder of a run.

    Attributes:
        folder: the folder.
        summary: results; of a run that has none, what its metrics tell.
        config: the configuration as plain values; empty if there is none.
        layers: the layers before and after; None if nothing is known of them.
        examples: images with outputs; None if there are none.
        why_no_examples: the reason.
        has_net: whether there are weights.
        traceback: of a run that failed.
        notes: what is missing or damaged, in sentences.
    """

    folder: Path
    summary: Summary
    config: Mapping[str, Any] = field(default_factory=dict)
    layers: NetworkSummary | None = None
    examples: Examples | None = None
    why_no_examples: str = ""
    has_net: bool = False
    traceback: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the folder, and of the one around it if that says more."""
        folder = self.folder.resolve()
        return f"{folder.parent.name}/{folder.name}" if len(folder.name) < 9 else folder.name


def read_run(folder: Path) -> RunFiles:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: the folder holds nothing of a run.
    """
    if not any((folder / name).exists() for name in (SUMMARY, CONFIG, ".hydra", METRICS)):
        raise FileNotFoundError(
            f"{folder} holds no run: there is neither {SUMMARY} nor {CONFIG}; give the folder of a run or of a sweep"
        )
    notes: list[str] = []
    summary, config = _summary(folder, notes), _config(folder, notes)
    examples, reason = _examples(folder)
    return RunFiles(
        folder,
        summary,
        config,
        _layers(folder, summary, notes),
        examples,
        reason,
        (folder / NET).is_file(),
        (folder / ERROR).read_text(errors="replace") if (folder / ERROR).is_file() else "",
        tuple(notes),
    )


def _summary(folder: Path, notes: list[str]) -> Summary:
    try:
        return Summary.load(folder)
    except FileNotFoundError:
        notes.append(f"There is no {SUMMARY}: the run was killed, or is not finished.")
    except (ValueError, OSError) as error:
        notes.append(f"{SUMMARY} cannot be read: {error}.")
    rows = _metrics(folder)
    if rows:
        notes.append(f"The curves are those of {METRICS}.")
    return Summary(curves=rows, epochs=len(rows))


def _metrics(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of each epoch that a CSV logger has written; none if there is no such file."""
    rows: dict[int, dict[str, float]] = {}
    for line in complete_rows(folder / METRICS):
        values = {name: _number(text) for name, text in line.items()}
        epoch = values.pop("epoch", math.nan)
        metrics = {k: v for k, v in values.items() if not k.startswith("test/") and k != "step"}
        if metrics and not math.isnan(epoch):
            rows.setdefault(int(epoch), {"epoch": int(epoch)}).update(metrics)
    return [rows[epoch] for epoch in sorted(rows)]


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):  # what another logger has written
        return math.nan


def _config(folder: Path, notes: list[str]) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    except FileNotFoundError:
        notes.append(f"There is no {CONFIG}.")
        return {}
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        notes.append(f"{CONFIG} cannot be read: {error}.")
        return {}
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _layers(folder: Path, summary: Summary, notes: list[str]) -> NetworkSummary | None:
    """Return the layers with all their costs, else with their channels alone."""
    try:
        return load_layers(folder)
    except FileNotFoundError:
        pass  # of a run from before there was this file; its summary has the channels
    except (ValueError, OSError) as error:
        notes.append(f"{LAYERS} cannot be read: {error}.")
    return layers_of_widths(summary.widths) if summary.widths else None


def _examples(folder: Path) -> tuple[Examples | None, str]:
    try:
        return Examples.load(folder), ""
    except NoExamples as error:
        return None, str(error)
