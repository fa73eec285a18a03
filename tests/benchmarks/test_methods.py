"""Runs and output of ``python -m benchmarks.methods``."""

from pathlib import Path

import pytest

from benchmarks.methods.__main__ import BUDGETS, DENSE, VARIANTS, configuration, job_of
from benchmarks.methods.report import intervals, steps_of, table, write

ROW = {
    "seed": 0,
    "resource": "macs",
    "budget": 0.5,
    "variant": "random",
    "miou": 0.8,
    "macs": 0.5,
    "params": 0.4,
}
ROW |= {"latency": 0.6, "seconds": 9.0, "epochs": 24, "steps": 504, "candidate_steps": 0}
ROUNDS = ROW | {"variant": "NetAdapt, L2", "miou": 0.9, "steps": 432, "candidate_steps": 66}
LATENCY = ROW | {"resource": "latency", "macs": 0.4}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_run_has_only_the_budget_of_its_job(variant, budget, tmp_path):
    config = configuration((3, budget, variant), tmp_path)
    assert config.seed == 3
    assert dict(config.prune.budget) == dict([budget])
    assert config.prune.limits.layers == 0.85
    uses_latency = budget[0] == "latency" or variant == "slimming, seconds"
    assert ("latency" in config.prune.resources) == uses_latency


def test_the_dense_network_is_not_pruned():
    assert configuration((0, ("macs", 1.0), DENSE), Path()).prune is None


def test_the_table_shows_budget_steps_and_steps_of_candidates():
    rows = [ROW, ROUNDS, ROUNDS | {"seed": 1, "candidate_steps": 70}, LATENCY]
    assert job_of(ROUNDS) == (0, ("macs", 0.5), "NetAdapt, L2")
    assert steps_of(rows, ("macs", 0.5), "NetAdapt, L2") == "432 + 66 to 70"
    assert [line.split(" | ")[:4] for line in table(rows)[2:]] == [
        ["| 50% of the MACs", "NetAdapt, L2", "2", "432 + 66 to 70"],
        ["| 50% of the MACs", "random", "1", "504"],
        ["| 50% of the latency", "random", "1", "504"],
    ]


def test_differences_are_from_the_dense_network_of_the_same_seed():
    dense = [ROW | {"seed": seed, "variant": DENSE, "budget": 1.0, "miou": 0.8} for seed in (0, 1)]
    pruned = [ROW | {"seed": 0, "miou": 0.75}, ROW | {"seed": 1, "miou": 0.72}]
    lines = intervals([*dense, *pruned])
    assert lines[2:] == ["- 50% of the MACs: random -0.065 [-0.256, +0.126]."]  # 12.706 * 0.015


def test_page_picture_and_numbers_are_written(tmp_path):
    (tmp_path / "methods.md").write_text("before\n<!-- study -->\n<!-- /study -->\nafter\n")
    write([ROW, ROUNDS, LATENCY], tmp_path)
    text = (tmp_path / "methods.md").read_text()
    assert text.startswith("before")
    assert "50% of the latency" in text
    assert (tmp_path / "figures" / "methods.png").stat().st_size > 5000
