"""The comparison of losses of distillation after one repaired cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.distillation.losses import interval, main, table


def row(seed: int, variant: str, trained: float) -> dict[str, object]:
    return {"seed": seed, "variant": variant, "trained": trained, "dense": 0.9, "cut": 0.5}


def test_the_table_pairs_runs_of_the_same_seed() -> None:
    rows = [row(1, "none", 0.7), row(2, "none", 0.8), row(3, "none", 0.1)]
    rows += [row(1, "dist", 0.71), row(2, "dist", 0.83)]
    mean, half = interval([0.01, 0.03])
    assert half == pytest.approx(12.7062 * 0.01, rel=1e-4)  # Student's t with one degree of freedom
    assert f"| dist (2) | 0.7700 | {mean:+.4f} | {half:.4f} |" in table(rows)


def test_a_small_run_is_stored_and_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "--folder",
        str(tmp_path),
        "--size",
        "small",
        "--seeds",
        "1",
        "--steps",
        "2",
        "--budget",
        "0.5",
    ]
    command += ["--variants", "none", "dist"]
    main(command)
    main(command)
    rows = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["none", "dist"]
    assert "| dist (1) |" in capsys.readouterr().out
    main([*command, "--gradients"])
    assert "'dist'" in capsys.readouterr().out
