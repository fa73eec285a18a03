"""Tables of the sizes and scores of one network, or of a dense and a pruned one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lightning_prune.reporting.model_size import Sizes
from lightning_prune.utils.formatting import si
from lightning_prune.utils.metrics import SCORE_LABELS
from lightning_prune.utils.tables import NOTHING, Table

__all__ = ["Table", "comparison", "place_of", "share", "single", "threads_or_device"]

MOST_CLASSES = 20  # that a table lists; the scores of all are in summary.json
Scores = Mapping[str, float]


def comparison(
    dense: Sizes, pruned: Sizes, dense_scores: Scores, pruned_scores: Scores, where: str, stage: str = "test"
) -> Table:
    """Return a table that compares a dense and a pruned network: sizes, latency if measured, and test scores.

    Args:
        dense: sizes of the dense network.
        pruned: sizes of the pruned network.
        dense_scores: ``miou`` and ``iou_<class>``, or ``accuracy``, of the dense network; empty if none was trained.
        pruned_scores: the same of the pruned network.
        where: device of the latency measurement, see :func:`threads_or_device`.
        stage: name of the set that the scores are of.
    """
    sizes = [
        (before.label, before.text, after.text, share(after.value, before.value))
        for before, after in zip(_size_rows(dense, where), _size_rows(pruned, where), strict=True)
    ]
    scores = [
        _change(label, dense_scores.get(name), pruned_scores[name])
        for name, label in _score_labels(pruned_scores, stage)
    ]
    return Table(("", "dense", "pruned", "pruned / dense"), [*sizes, *scores])


def single(net: Sizes, scores: Scores, where: str, stage: str = "test") -> Table:
    """Return the same table for one network that was not pruned."""
    sizes = [(row.label, row.text) for row in _size_rows(net, where)]
    ious = [(label, f"{scores[name]:.4f}") for name, label in _score_labels(scores, stage)]
    return Table(("", "dense"), [*sizes, *ious])


def threads_or_device(threads: int, device: str) -> str:
    """Return the device of a measurement for a table: the number of threads on a CPU, else its name.

    Example:
        >>> threads_or_device(1, "cpu"), threads_or_device(2, "cpu"), threads_or_device(2, "NVIDIA H200")
        ('1 thread', '2 threads', 'NVIDIA H200')
    """
    return device if device != "cpu" else f"{threads} thread{'s' * (threads != 1)}"


def place_of(threads: int, device: str) -> str:
    """Return the device of a measurement for a sentence.

    Example:
        >>> place_of(1, "cpu"), place_of(2, "NVIDIA H200")
        ('the CPU with 1 thread', 'NVIDIA H200')
    """
    where = threads_or_device(threads, device)
    return f"the CPU with {where}" if device == "cpu" else where


def share(part: float, whole: float) -> str:
    """Return a part of a whole in percent, as text.

    Example:
        >>> share(1, 3)
        '33.3 %'
    """
    return f"{100 * part / whole:.1f} %" if whole else NOTHING


class _SizeRow(NamedTuple):
    """A size with its label, as text and as number."""

    label: str
    text: str
    value: float


def _size_rows(net: Sizes, where: str) -> list[_SizeRow]:
    rows = [
        _SizeRow("MACs", si(net.macs, 4, " "), net.macs),
        _SizeRow("parameters", si(net.params, 4, " "), net.params),
        _SizeRow("file size", si(net.bytes, 3, " ", "B"), net.bytes),
    ]
    if net.latency_ms is not None:
        rows.append(_SizeRow(f"latency, 1 image, {where}", f"{net.latency_ms:.2f} ms", net.latency_ms))
    return rows


def _score_labels(scores: Scores, stage: str) -> list[tuple[str, str]]:
    """Return name and label of each score, that of all classes first."""
    mean = [(name, f"{stage} {label}") for name, label in SCORE_LABELS.items() if name in scores]
    per_class = {"iou_": f"{stage} IoU", "accuracy_": f"{stage} accuracy"}
    classes = [
        (name, f"{label}, {name.removeprefix(prefix)}")
        for prefix, label in per_class.items()
        for name in scores
        if name.startswith(prefix)
    ]
    return mean + (classes if len(classes) <= MOST_CLASSES else [])


def _change(label: str, before: float | None, after: float) -> tuple[str, str, str, str]:
    """Return the table row of a score before and after pruning, with the difference if both are known."""
    if before is None:
        return label, NOTHING, f"{after:.4f}", NOTHING
    return label, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"
