"""``python -m benchmarks.criteria``: one protocol for all methods, and the tables."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from benchmarks.common.studies import finished
from benchmarks.criteria.__main__ import STAGES, TESTED, main, run
from benchmarks.criteria.methods import MAX_REMOVED, METHODS, conv_macs
from benchmarks.criteria.report import best, methods, table, verdict, write
from benchmarks.criteria.tasks import TASKS, fit, trained
from lightning_prune import trace

pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.filterwarnings("ignore")  # as in the command


def row(method: str, budget: float, score: float, seed: int = 0) -> dict:
    return {"seed": seed, "task": "brain", "method": method, "budget": budget, "macs": budget, "score": score}


ROWS = [
    row("dense", 0.5, 0.9),
    row("random", 0.5, 0.7),
    row("L2", 0.5, 0.8),
    row("L2", 0.5, 0.9, seed=1),
    row("torch-pruning L2", 0.5, 0.83),
]


def test_macs_are_counted_alike_for_ours_and_theirs(tmp_path):
    for name in TASKS:
        task = trained(name, 0, tmp_path, small=True)
        example = task.module.example_input_array
        assert conv_macs(task.net, example) == trace(task.net, example).cost("macs")


@pytest.mark.parametrize("name", ["Taylor, gates", "torch-pruning Taylor, limits"])
def test_a_method_cuts_to_the_share_within_the_limit(name, tmp_path):
    task = trained("digits", 0, tmp_path, small=True)
    before = trace(task.net, task.module.example_input_array).widths()
    method = METHODS[name](task, 0)
    for share in STAGES[:4]:
        fit(task, 1, method.callbacks(), lr=0.0)
        assert share - 0.02 < method.cut(share) <= share
    after = trace(task.net, task.module.example_input_array).widths()
    assert all(after[layer] >= int((1 - MAX_REMOVED) * width) for layer, width in before.items())


def test_collecting_statistics_before_the_first_cut_changes_no_weight(tmp_path):
    task = trained("digits", 0, tmp_path, small=True)
    before = {name: p.clone() for name, p in task.net.named_parameters()}
    fit(task, 1, METHODS["Taylor, gates"](task, 0).callbacks(), lr=0.0)
    assert all(torch.equal(p, before[name]) for name, p in task.net.named_parameters())


def test_the_protocol_trains_a_network_that_torch_pruning_left_in_eval_mode(tmp_path):
    task = trained("digits", 0, tmp_path, small=True)
    METHODS["torch-pruning L2"](task, 0)
    assert not task.net.training
    means = [m.running_mean.clone() for m in task.net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    fit(task, 1, [])
    trained_means = [m.running_mean for m in task.net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(torch.equal(a, b) for a, b in zip(means, trained_means, strict=True))


def test_a_run_tests_at_every_budget_and_repeats_bit_for_bit(tmp_path):
    first, again = ([*run((0, "digits", "random"), tmp_path, small=True)] for _ in range(2))
    assert [row["budget"] for row in first] == list(TESTED)
    assert [row["score"] for row in first] == [row["score"] for row in again]


def test_the_command_writes_page_picture_and_numbers_and_repeats_nothing(tmp_path):
    options = ["--small", "--seeds", "0", "--tasks", "digits", "--methods", "dense", "IPAD, omega 1"]
    options += ["--folder", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    main(options)
    rows = copy.deepcopy(finished(tmp_path / "runs"))
    main(options)
    assert finished(tmp_path / "runs") == rows
    assert len(rows) == 2 * len(TESTED)
    assert "| IPAD, omega 1 |" in (tmp_path / "docs" / "criteria.md").read_text()
    assert json.loads((tmp_path / "docs" / "data" / "criteria.json").read_text())["runs"] == rows


def test_the_table_is_ordered_by_mean_and_the_verdict_by_the_best(tmp_path):
    assert methods(ROWS, "brain") == ["dense", "L2", "torch-pruning L2", "random"]
    assert "| L2 | 0.850 ± 0.071 | 0.850 | 2 |" in table(ROWS, "brain")
    assert best(ROWS, "brain", 0.5, theirs=True) == ("torch-pruning L2", 0.83)
    assert verdict(ROWS, "brain") == [
        "- 50%: our best, L2, has 0.850: +0.020 against torch-pruning L2, -0.050 against dense"
    ]
    write(ROWS, tmp_path)
    assert (tmp_path / "figures" / "criteria.png").stat().st_size > 5000
