"""The page of the engine's speed compares the same networks, and says what other work of the machine did."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.engine_report import page


def _row(network: str, ours: float, theirs: float) -> dict[str, Any]:
    parts = dict.fromkeys(("trace", "plan", "surgery", "proof"), ours / 4)
    return {"network": network, "ours": {**parts, "total": ours}, "peer": {"total": theirs}}


def _page(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> str:
    head = {"date": "2026-01-01", "machine": "M", "versions": {"torch": "2", "torch-pruning": "1"}}
    return page({"now": {**head, "runs": now}, "before": {**head, "runs": before}})


def test_before_is_given_on_the_networks_of_now() -> None:
    text = _page([_row("a", 1.0, 2.0)], [_row("a", 4.0, 2.0), _row("b", 1.0, 9.0)])
    assert "- Before: **0.50 times the speed of torch-pruning** in the geometric mean over 1 networks" in text
    assert "| b |" not in text


def test_the_gain_is_also_given_against_the_faster_of_their_two_times() -> None:
    now = [_row("a", 1.0, 4.0), _row("b", 1.0, 4.0)]
    text = _page(now, [_row("a", 1.0, 1.0), _row("b", 1.0, 4.0)])
    assert "took 2.00 times its time" in text
    assert "**2.00 times as fast**, and slower on 0" in text
    assert "tasks per processor" not in text
    assert "(3.5 tasks per processor)" in _page([{**now[0], "load": 3.5}], [_row("a", 1.0, 1.0)])


def test_nothing_is_said_of_the_machine_without_a_measurement_before() -> None:
    assert "shared with other work" not in _page([_row("a", 1.0, 4.0)], [])


def test_versions_that_differ_are_told() -> None:
    rows = [
        {**_row(name, 1.0, 4.0), "commit": commit} for name, commit in (("a", "x"), ("b", "y"), ("c", "x"))
    ]
    assert "same version of ours: 2 at x, 1 at y." in _page(rows, [])
    assert "same version" not in _page(rows[:1], [])
