"""Tests of the study of several processes: what it checks, and two of its cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.robustness.distributed import CASES, agreement, narrower, section

END = {
    "record": {"kept": {"w": {"0": [0, 2]}}},
    "cuts": [[0, 1, {}], [1, 1, {}]],
    "weights": ["a", "b"],
    "within_budget": True,
}


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, None),
        ({"weights": ["a", "c"]}, "same weights after every batch"),
        ({"record": None}, "same record"),
        ({"cuts": []}, "same cuts"),
        ({"within_budget": False}, "within the budget"),
    ],
)
def test_a_rank_that_differs_is_noticed(change: dict, wrong: str | None):
    checks = agreement([END, {**END, **change}])
    assert [name for name, good in checks.items() if not good] == ([wrong] if wrong else [])


def test_a_record_that_brings_back_a_channel_is_noticed():
    before = {"kept": {"w": {"0": [0, 2, 3]}}}
    assert narrower(END["record"], before)
    assert narrower({"kept": {"w": {"0": [0]}, "v": {"1": [5]}}}, before)
    assert not narrower({"kept": {"w": {"0": [0, 1]}}}, before)


def test_the_page_names_what_failed():
    row = {
        "case": next(iter(CASES)),
        "cuts": [1, 2],
        "macs": 0.5,
        "checks": {"same record": False, "same cuts": True},
    }
    content = {"versions": {"torch": "2"}, "date": "today", "runs": [row]}
    assert "| `ddp`, 2 processes | 1, 2 | 0.500 | NOT same record; same cuts | NO |" in section(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["resumed on 1 instead of 2, within an epoch", "fewer samples on rank 1, as many batches"]
)
def test_case(case: str, tmp_path: Path):
    assert all(CASES[case](tmp_path)["checks"].values())
