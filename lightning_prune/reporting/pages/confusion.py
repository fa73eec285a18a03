"""The confusion of the classes by the dense and the pruned network, as tables whose rows are the true classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_prune.reporting.pages.run_files import RunFiles
from lightning_prune.reporting.run_folder import Summary
from lightning_prune.utils.formatting import si

__all__ = ["confusion_of"]

MOST_CLASSES = 40  # whose table is shown; of more classes the most frequent mistakes are listed
FEW_CLASSES = 8  # whose tables stand side by side, with a decimal place
MOST_MISTAKES = {True: 5, False: 15}  # that are listed, with and without a table above
STRONG = 0.3  # share whose tint needs bright digits
LEAST_CHANGE = 0.005  # of a share, to be listed

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]


@dataclass(frozen=True)
class _Confusion:
    """Matrices of the same images: name of a network -> counts ``(true, taken for)``."""

    counts: Mapping[str, Counts]
    images: str
    dense: str = ""

    @property
    def last(self) -> Counts:
        """That of the network of the run."""
        return [*self.counts.values()][-1]

    def shares(self, name: str) -> Shares:
        """Return the shares of each true class; NaN for a class that does not occur."""
        counts = self.counts[name]
        with np.errstate(invalid="ignore"):
            return counts / counts.sum(1, keepdims=True)


def confusion_of(run: RunFiles, baseline: Summary | None = None) -> dict[str, Any] | None:
    """Return texts and tables of a page; None if the run has no confusion, as runs from before there was one.

    Dense and pruned network are compared on the same images: on those of the test if there is a dense run, else on
    those of the validation, where the dense network is the run's own before its first cut.

    Args:
        run: the content of its folder.
        baseline: results of a dense run on the same data.
    """
    confusion = _chosen(run.summary, baseline)
    if confusion is None:
        return None
    number = len(confusion.last)
    names = (
        run.summary.class_names if len(run.summary.class_names) == number else list(map(str, range(number)))
    )
    unit = "pixels" if _of_pixels(run) else "images"
    shown = number <= MOST_CLASSES
    mistakes = _mistakes(confusion, names, MOST_MISTAKES[shown]) if number > 2 else None
    return {
        "intro": _intro(confusion, unit, number),
        "tables": _tables(confusion, names, unit, _ignored(run, number)) if shown else [],
        "tabs": number > FEW_CLASSES,
        "unit": unit,
        "names": names,
        "mistakes": mistakes,
    }


def _chosen(summary: Summary, baseline: Summary | None) -> _Confusion | None:
    """Return the matrices of the best comparison that there is."""
    own = "pruned network" if summary.pruned else "network"
    if baseline is not None and _fit(summary, baseline):
        both = {"dense run": _counts(baseline.confusion), own: _counts(summary.confusion)}
        return _Confusion(both, "test", "The dense network is that of the dense run.")
    kept = {name: _counts(matrix) for name, matrix in summary.val_confusion.items()}
    if summary.pruned and {"dense", "final"} <= kept.keys():
        epochs = f"{summary.dense_epoch} epoch{'s' * (summary.dense_epoch != 1)}"
        text = f"The dense network is this run's own, right before its first cut after {epochs} of training, "
        text += "so that a part of the difference is what training has added since."
        return _Confusion({"dense network": kept["dense"], own: kept["final"]}, "validation", text)
    if summary.confusion:
        return _Confusion({own: _counts(summary.confusion)}, "test")
    return _Confusion({own: kept["final"]}, "validation") if "final" in kept else None


def _fit(summary: Summary, baseline: Summary) -> bool:
    """Return whether two tests were of the same classes, and as many pixels or images of each."""
    if not summary.confusion or summary.class_names != baseline.class_names:
        return False
    totals = [_counts(each.confusion).sum(1).tolist() for each in (summary, baseline) if each.confusion]
    return len(totals) == 2 and totals[0] == totals[1]


def _counts(matrix: Sequence[Sequence[int]]) -> Counts:
    return np.array(matrix, dtype=np.int64)


def _of_pixels(run: RunFiles) -> bool:
    """Return whether the run is one of segmentation."""
    summary = run.summary
    names = [
        *summary.test,
        *summary.val,
        *(key.rpartition("/")[2] for row in summary.curves[:1] for key in row),
    ]
    return any(name == "miou" or name.startswith("iou_") for name in names)


def _ignored(run: RunFiles, number: int) -> int | None:
    """Return the class whose pixels are left out of the metrics; None if there is none."""
    module = run.config.get("module")
    ignored = module.get("ignore_index") if isinstance(module, Mapping) else None
    return ignored if isinstance(ignored, int) and 0 <= ignored < number else None


def _intro(confusion: _Confusion, unit: str, number: int) -> str:
    share = f"Of the {unit} of each true class in the {confusion.images} set, the share that is taken for each class."
    if number > MOST_CLASSES:
        share = f"{number} classes are too many for a table; these are the most frequent mistakes, as shares of the "
        share += f"{unit} of the true class in the {confusion.images} set."
    elif len(confusion.counts) == 2:
        share += " In the differences, blue is better and orange is worse."
    return f"{share} {confusion.dense}".strip()


def _tables(
    confusion: _Confusion, names: Sequence[str], unit: str, ignored: int | None
) -> list[dict[str, Any]]:
    """Return a table for each network, and one of their differences."""
    digits = 1 if len(names) <= FEW_CLASSES else 0
    shares = {name: confusion.shares(name) for name in confusion.counts}
    absent = [f"no {unit}"] * len(names)
    if ignored is not None:
        absent[ignored] = "not counted"
    tables = [
        {
            "title": name,
            "note": "per cent",
            "rows": _rows(each, confusion.counts[name], names, absent, digits),
        }
        for name, each in shares.items()
    ]
    if len(shares) == 2:
        dense, pruned = shares.values()
        common = np.where(np.isfinite(dense), confusion.last, 0)
        rows = _rows(pruned - dense, common, names, absent, digits, difference=True)
        tables.append({"title": "difference", "note": "percentage points", "rows": rows})
    return tables


def _rows(
    shares: Shares,
    counts: Counts,
    names: Sequence[str],
    absent: Sequence[str],
    digits: int,
    difference: bool = False,
) -> list[dict[str, Any]]:
    """Return name, cells and total of each true class; instead of cells a text for a class that does not occur."""
    totals = counts.sum(1).tolist()
    make = _difference if difference else _share
    return [
        {
            "name": name,
            "total": si(totals[true], 3, " "),
            "absent": "" if totals[true] else absent[true],
            "cells": [
                {
                    **make(float(share), digits, guess == true),
                    "title": _title(names, true, guess, float(share), int(counts[true, guess]), difference),
                }
                for guess, share in enumerate(shares[true])
            ],
        }
        for true, name in enumerate(names)
    ]


def _share(share: float, digits: int, right: bool) -> dict[str, Any]:
    """Return text and tint of a share; the tint grows with its root, so that rare mistakes are visible."""
    small = 0 < share < 0.5 * 10 ** -(digits + 2)
    text = "" if not share else f"<{10**-digits:g}" if small else f"{100 * share:.{digits}f}"
    kind = "strong" if share > STRONG else "faint" if small else ""
    return {"text": text, "tint": _tint(share), "kind": kind, "right": right}


def _difference(change: float, digits: int, right: bool) -> dict[str, Any]:
    """Return text and tint of a change: more of the right class is better, more of another is worse."""
    text = f"{100 * change:+.{digits}f}"
    text = "" if float(text or 0) == 0 else text.replace("-", "\N{MINUS SIGN}")
    tint = _tint(3 * abs(change)) if text else 0
    kind = "better" if (change > 0) == right else "worse"
    return {
        "text": text,
        "tint": tint,
        "kind": f"{kind} strong" if tint > _tint(STRONG) else kind,
        "right": right,
    }


def _tint(share: float) -> int:
    return round(100 * min(max(share, 0.0), 1.0) ** 0.5) if share == share else 0


def _title(
    names: Sequence[str], true: int, guess: int, share: float, count: int, difference: bool = False
) -> str:
    """Return what a cell says, in words."""
    what = "right" if true == guess else f"taken for {names[guess]}"
    value = f"{100 * share:+.2f} percentage points" if difference else f"{100 * share:.2f} % ({count})"
    return f"{names[true]}, {what}: {value}"


def _mistakes(confusion: _Confusion, names: Sequence[str], most: int) -> dict[str, Any] | None:
    """Return the mistakes that have become more frequent; without a dense network, the most frequent ones."""
    shares = [np.nan_to_num(confusion.shares(name)) for name in confusion.counts]
    gain = shares[1] - shares[0] if len(shares) == 2 else shares[0].copy()
    np.fill_diagonal(gain, 0)
    order = np.argsort(-gain, axis=None, kind="stable")[:most]
    pairs = [divmod(int(place), len(names)) for place in order]
    rows = [
        [names[true], names[guess], *(f"{100 * each[true, guess]:.1f} %" for each in shares)]
        for true, guess in pairs
        if gain[true, guess] > LEAST_CHANGE
    ]
    if not rows:
        return None
    title = "Mistakes that have become more frequent" if len(shares) == 2 else "The most frequent mistakes"
    networks = [name.removesuffix(" network") for name in confusion.counts]
    return {"title": title, "heads": ["true class", "taken for", *networks], "rows": rows}
