"""The study of distillation: its runs, which are not repeated, and the arithmetic of its table."""

from __future__ import annotations

import json

import pytest

from benchmarks.common.studies import finished, jobs
from benchmarks.distillation.__main__ import BUDGETS, VARIANTS, configuration
from benchmarks.distillation.report import difference, intervals, recovered, table, write


def row(seed: int, budget: float, variant: str, miou: float) -> dict:
    return {"seed": seed, "budget": budget, "variant": variant, "test_miou": miou}


ROWS = [
    row(0, 1.0, "dense", 0.90),
    row(1, 1.0, "dense", 0.88),
    row(0, 0.26, "none", 0.80),
    row(1, 0.26, "none", 0.84),
    row(0, 0.26, "hinton", 0.85),
    row(1, 0.26, "hinton", 0.86),
    row(0, 0.26, "fsp", 0.78),
]


def test_parts_divide_the_runs_seed_by_seed():
    whole = jobs((0, 1, 2), BUDGETS, VARIANTS)
    assert len(set(whole)) == 30
    assert [job[0] for job in whole] == sorted(job[0] for job in whole)
    assert [job[1] for job in whole[:10]] == [0.26] * 5 + [0.1] * 5
    parts = [jobs((0, 1, 2), BUDGETS, VARIANTS, part=f"{n}/3") for n in (1, 2, 3)]
    assert sorted(job for part in parts for job in part) == sorted(whole)


def test_runs_of_one_budget_differ_only_in_the_losses(tmp_path):
    configs = {variant: configuration(1, 0.1, variant, tmp_path) for variant in VARIANTS}
    losses = {name: {k for k in ("alpha", "beta", "lambda_") if c.distill[k]} for name, c in configs.items()}
    assert losses["none"] == set()
    assert losses["all"] == losses["hinton"] | losses["attention"] | losses["fsp"]
    assert all(configs["all"].distill[k] == configs[name].distill[k] for name in losses for k in losses[name])
    assert (
        len({(c.prune.budget.macs, c.prune.limits.layers, c.trainer.max_epochs) for c in configs.values()})
        == 1
    )
    assert configs["none"].threads == 1


def test_the_recovered_share_is_of_seeds_that_have_all_runs():
    assert recovered(ROWS, 0.26, "hinton") == pytest.approx((0.05 + 0.02) / (0.10 + 0.04))
    assert recovered(ROWS, 0.26, "fsp") == pytest.approx(-0.02 / 0.10)
    assert recovered(ROWS, 0.26, "all") is None
    assert difference(ROWS, 0.26, "hinton") == pytest.approx([0.05, 0.02])
    lines = table(ROWS)
    assert lines[0] == "Dense: test mIoU 0.890 ± 0.014 (2)."
    assert "| 26% | Hinton | 0.855 ± 0.007 (2) | 0.035 ± 0.021 (2) | 50 % |" in lines


def test_a_difference_has_the_interval_of_its_seeds():
    text = "\n".join(intervals(ROWS))
    assert "- 26%: Hinton +0.035 [-0.156, +0.226]; FSP -0.020 (one seed)." in text  # 12.706 * 0.015
    assert text.endswith("Intervals that exclude 0: none.")
    gains = [row(seed, 0.1, name, value) for name, value in (("none", 0.5), ("fsp", 0.6)) for seed in (0, 1)]
    assert intervals([*ROWS, *gains])[-1] == "Intervals that exclude 0: FSP at 10%."


def test_the_page_around_the_table_stays(tmp_path):
    page = tmp_path / "distillation.md"
    page.write_text("# Before\n\n<!-- study -->\nold\n<!-- /study -->\n\nafter\n")
    write(ROWS, tmp_path)
    text = page.read_text()
    assert text.startswith("# Before\n\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert json.loads((tmp_path / "data" / "distillation.json").read_text())["runs"] == ROWS
    assert (tmp_path / "figures" / "distillation.png").stat().st_size > 5000


def test_finished_runs_of_all_parts_are_read(tmp_path):
    for part, rows in (("1-of-2", ROWS[:3]), ("2-of-2", ROWS[3:])):
        (tmp_path / f"runs-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(finished(tmp_path)) == ROWS
