"""Tables for people: rich on a terminal, aligned Markdown anywhere else (level 4)."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_prune.reporting.model_size import Sizes
from lightning_prune.utils.formatting import si
from lightning_prune.utils.tables import NOTHING, Table

__all__ = ["Table", "comparison", "only", "share", "threads_or_device"]

Scores = Mapping[str, float]


def comparison(dense: Sizes, pruned: Sizes, dense_scores: Scores, pruned_scores: Scores, where: str) -> Table:
    """Dense against pruned: sizes, latency where it was measured, scores on the test set.

    Args:
        dense: sizes of the one.
        pruned: sizes of the other.
        dense_scores: ``miou`` and ``iou_<class>``; may be empty where no dense network was trained.
        pruned_scores: likewise.
        where: what the latency was measured on, in words.
    """
    sizes = zip(_sizes(dense, where), _sizes(pruned, where), strict=True)
    rows = [(label, shown, after, share(b, a)) for (label, shown, a), (_, after, b) in sizes]
    scores = [
        _change(label, dense_scores.get(name), pruned_scores[name]) for name, label in _ious(pruned_scores)
    ]
    return Table(("", "dense", "pruned", "pruned / dense"), [*rows, *scores])


def only(net: Sizes, scores: Scores, where: str) -> Table:
    """The same facts about one network that was not pruned."""
    sizes = [(label, text) for label, text, _ in _sizes(net, where)]
    return Table(("", "dense"), [*sizes, *((label, f"{scores[name]:.4f}") for name, label in _ious(scores))])


def threads_or_device(threads: int, device: str) -> str:
    """What something was measured on.

    Example:
        >>> threads_or_device(1, "cpu"), threads_or_device(2, "cpu"), threads_or_device(2, "NVIDIA H200")
        ('1 thread', '2 threads', 'NVIDIA H200')
    """
    return device if device != "cpu" else f"{threads} thread{'s' * (threads != 1)}"


def share(part: float, whole: float) -> str:
    """A part of a whole in percent.

    Example:
        >>> share(1, 3)
        '33.3 %'
    """
    return f"{100 * part / whole:.1f} %" if whole else NOTHING


def _sizes(net: Sizes, where: str) -> list[tuple[str, str, float]]:
    """Label, text and number of each."""
    rows: list[tuple[str, str, float]] = [
        ("MACs", si(net.macs, 4, " "), net.macs),
        ("parameters", si(net.params, 4, " "), net.params),
        ("file size", si(net.bytes, 3, " ", "B"), net.bytes),
    ]
    if net.latency_ms is not None:
        rows.append((f"latency, 1 image, {where}", f"{net.latency_ms:.2f} ms", net.latency_ms))
    return rows


def _ious(scores: Scores) -> list[tuple[str, str]]:
    """Name and label, the mIoU first."""
    classes = [(name, f"test IoU, {name.removeprefix('iou_')}") for name in scores if name.startswith("iou_")]
    return [("miou", "test mIoU")] * ("miou" in scores) + classes


def _change(label: str, before: float | None, after: float) -> tuple[str, str, str, str]:
    if before is None:
        return label, NOTHING, f"{after:.4f}", NOTHING
    return label, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"
