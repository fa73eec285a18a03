"""The page of ``python -m benchmarks.latency.selection``: means, errors and gains of a few rows by hand."""

from __future__ import annotations

from typing import Any

from benchmarks.latency.selection_report import page


def row(seed: int, criterion: str, selection: str, trained: float, measured: float) -> dict[str, Any]:
    fixed = {"task": "fashion", "dense": 0.9, "macs": 0.2, "after_cut": 0.7}
    return {**fixed, "seed": seed, "criterion": criterion, "selection": selection, "trained": trained,
            "measured": measured}  # fmt: skip


def test_scores_are_compared_by_seed_for_each_criterion_and_for_the_best() -> None:
    scores = [
        row(1, "a", "greedy", 0.80, 0.55), row(1, "a", "optimal", 0.82, 0.50),
        row(2, "a", "greedy", 0.70, 0.45), row(2, "a", "optimal", 0.72, 0.51),
        row(1, "b", "greedy", 0.83, 0.50), row(1, "b", "optimal", 0.81, 0.50),
        row(2, "b", "greedy", 0.60, 0.50), row(2, "b", "optimal", 0.60, 0.50),
    ]  # fmt: skip
    content = {"date": "2026-01-02", "versions": {"torch": "2"}, "machine": "one", "scores": scores}
    text = page(content)
    assert "| fashion | a | greedy | 2 | 20.0% | 50.0% | 10.0% | 0.700 | **0.750** | 0.900 |" in text
    assert "| fashion | a | optimal | 2 | 20.0% | 50.5% | 1.0% | 0.700 | **0.770** | 0.900 |" in text
    assert "fashion, a: optimal less greedy, points by seed: +2.0, +2.0; mean +2.0." in text
    assert (
        "fashion, the best criterion of each: optimal less greedy, points by seed: -1.0, +2.0; mean +0.5."
        in text
    )


def test_measurements_of_one_plan_are_a_median_with_extremes() -> None:
    mobile = {"selection": "optimal", "multiple": 1, "macs": 0.6, "loss": 0.3, "predicted": 0.499, "seconds": 12.3,
              "measured": [0.52, 0.49, 0.48]}  # fmt: skip
    text = page({"date": "2026-01-02", "versions": {"torch": "2"}, "machine": "one", "mobile": [mobile]})
    assert "| optimal | 1 | 60.0% | 30.0% | 49.9% | **49.0%** | 48.0%, 52.0% | 12 |" in text
