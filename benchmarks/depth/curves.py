"""Scores of two methods at equal measured latency, seed by seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from benchmarks.common.studies import Row

__all__ = [
    "BUDGETS",
    "EXECUTIONS",
    "METHODS",
    "TASKS",
    "Difference",
    "chosen",
    "difference",
    "differences",
    "means",
]

TASKS = {"fashion": "ResNet-20, Fashion-MNIST", "brain": "U-Net, brain slices"}
EXECUTIONS = {"onnx": "ONNX Runtime", "eager": "PyTorch, eager"}
METHODS = ("width", "depth and width")
BUDGETS = (0.8, 0.65, 0.5, 0.35, 0.25)  # shares of the latency
POINTS = 50  # latencies at which two curves are compared


@dataclass(frozen=True)
class Difference:
    """Depth and width minus width alone, for one dense network.

    Attributes:
        low: smallest latency that both methods reach, as a share of the dense network's.
        high: largest latency at which both were measured.
        mean: mean difference of the scores between these.
        fastest: difference at the smallest latency.
    """

    low: float
    high: float
    mean: float
    fastest: float


def chosen(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Return the rows of networks that were measured, with certain values.

    Example:
        >>> chosen([{"seed": 1, "latency": 0.5}, {"seed": 2, "latency": 0.5}, {"seed": 1, "beyond": True}], seed=1)
        [{'seed': 1, 'latency': 0.5}]
    """
    return [
        row for row in rows if "beyond" not in row and all(row[key] == value for key, value in wanted.items())
    ]


def difference(
    width: Sequence[tuple[float, float]], both: Sequence[tuple[float, float]]
) -> Difference | None:
    """Compare two curves of (latency, score), interpolated between their points; None if they do not overlap.

    Example:
        >>> difference([(0.4, 0.5), (0.8, 0.7)], [(0.2, 0.5), (0.6, 0.7)])
        Difference(low=0.4, high=0.6, mean=0.1, fastest=0.1)
    """
    curves = [sorted(points) for points in (width, both)]
    if min(map(len, curves)) < 2:
        return None
    low, high = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
    if low >= high:
        return None
    at = np.linspace(low, high, POINTS)
    alone, deep = (np.interp(at, *np.array(points).T) for points in curves)
    gaps = deep - alone
    return Difference(low, high, round(float(gaps.mean()), 5), round(float(gaps[0]), 5))


def differences(rows: Sequence[Row], execution: str, task: str, when: str) -> dict[int, Difference]:
    """Return the comparison for each seed.

    Args:
        rows: of the study.
        execution: that latency was measured with.
        task: of the benchmark.
        when: ``"cut"``: scores before training; ``"trained"``: after it.
    """
    found = {}
    for seed in sorted({row["seed"] for row in rows}):
        curves = [
            [
                (row["latency"], row[when]["value"])
                for row in chosen(rows, execution=execution, task=task, seed=seed, method=method)
            ]
            for method in METHODS
        ]
        if (compared := difference(*curves)) is not None:
            found[seed] = compared
    return found


def means(
    rows: Sequence[Row], execution: str, task: str, method: str, when: str
) -> list[tuple[float, float]]:
    """Return latency in milliseconds and score of each budget, averaged over the seeds that reached it alike."""
    points = []
    for budget in BUDGETS:
        cuts = chosen(rows, execution=execution, task=task, method=method, budget=budget)
        if cuts:
            time = fmean(row["latency"] * row["dense_milliseconds"] for row in cuts)
            points.append((time, fmean(row[when]["value"] for row in cuts)))
    return points
