"""``python -m benchmarks.quality``: the order of the runs, one chain, torch-pruning's floors, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch_pruning")

from benchmarks.common.intervals import interval
from benchmarks.quality.__main__ import MORE, finished, main, ordered
from benchmarks.quality.__main__ import longer as longer_jobs
from benchmarks.quality.answers import answers
from benchmarks.quality.chain import NAMES
from benchmarks.quality.methods import METHODS
from benchmarks.quality.networks import floors_of, macs_of
from benchmarks.quality.peers import TorchPruning, forward_macs
from benchmarks.quality.plan import CORE, DEFAULT, LONG, STAGES, THIN
from benchmarks.quality.report import page
from benchmarks.quality.summary import Results, collapsed
from benchmarks.quality.tasks import TASKS, make_task
from lightning_prune import trace

SEEDS = [1, 2, 3, 4, 5]


def test_the_order_has_every_run_and_begins_with_the_repaired_core_on_all_tasks():
    jobs = list(dict.fromkeys(ordered(TASKS, NAMES, SEEDS)))
    assert {method for _, method, _, _ in jobs} == set(NAMES)
    assert {*CORE, *MORE} == set(METHODS)
    count = sum(len(method.repairs) for method in METHODS.values()) + 3
    assert len(jobs) == 5 * (3 * count - 1)  # CWD does not run on the classifier
    assert [job[:1] + job[2:] for job in jobs[:3]] == [(task, 1, True) for task in TASKS]
    assert {method for _, method, _, _ in jobs[: 3 * len(CORE)]} == set(CORE)


@pytest.mark.parametrize("everywhere", [False, True])
def test_torch_pruning_reaches_the_macs_and_keeps_our_floors(everywhere: bool):
    task = make_task("fashion", "small")
    net = task.build(1)
    floors, dense = floors_of(net, task.example), macs_of(net, task.example)
    assert forward_macs(net, task.example) == dense
    cutter = TorchPruning(net, task, floors, everywhere=everywhere)
    for share in STAGES:
        cutter.cut(share * dense, 0)
        assert macs_of(net, task.example) <= share * dense
    widths = {name.rpartition(".")[0]: width for name, width in trace(net, task.example).widths().items()}
    assert all(widths[name] >= floor for name, floor in floors.items())
    assert widths["head"] == 10


def test_the_command_runs_each_chain_once_and_writes_page_data_and_pictures(tmp_path: Path):
    options = ["--small", "--seeds", "1", "--tasks", "fashion", "--methods", "uniform L2", "--repair", "with"]
    options += ["--folder", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    main(options)
    (run,) = finished(tmp_path / "runs")
    (path,) = (tmp_path / "runs" / "runs").glob("*.json")
    written = path.stat().st_mtime_ns
    main(options)
    assert path.stat().st_mtime_ns == written
    assert [stage["share"] for stage in run["stages"]] == list(STAGES)
    dense_macs = macs_of(make_task("fashion", "small").build(0), torch.zeros(1, 1, 14, 14))
    for stage in run["stages"]:
        assert 0.9 * stage["share"] * dense_macs < stage["macs"] <= stage["share"] * dense_macs
    assert "| uniform L2, repaired |" in (tmp_path / "docs" / "quality.md").read_text()
    rows = json.loads((tmp_path / "docs" / "data" / "quality.json").read_text())["runs"]
    assert [row["share"] for row in rows] == [1.0, *STAGES]
    assert (tmp_path / "docs" / "figures" / "quality.svg").stat().st_size > 5000


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []

    def run(task: Any, method: str, *rest: Any) -> dict[str, Any]:
        if method == "random":
            raise ValueError("no luck")
        done.append(method)
        return {"dense": {"test": {"value": 1.0}}, "stages": [], "seconds": 0.0}

    monkeypatch.setattr("benchmarks.quality.__main__.run", run)
    options = [
        "--small",
        "--seeds",
        "1",
        "--tasks",
        "brain",
        "--methods",
        "random",
        "LAMP",
        "--repair",
        "with",
    ]
    with pytest.raises(SystemExit, match=r"1 runs failed.*'random', 1, True"):
        main([*options, "--folder", str(tmp_path), "--docs", str(tmp_path / "docs")])
    assert done == ["LAMP"]


def test_a_class_is_lost_only_if_the_dense_network_had_it():
    dense = {"value": 0.5, "classes": [0.9, 0.21, 0.1]}
    assert collapsed("brain", {"value": 0.3, "classes": [0.9, 0.049, 0.1]}, dense)
    assert not collapsed("brain", {"value": 0.3, "classes": [0.9, 0.05, 0.0]}, dense)
    assert collapsed("fashion", {"value": 0.24, "classes": []}, dense)


def test_an_interval_of_one_value_excludes_nothing():
    assert interval([0.5]).verdict == "open"
    assert interval([0.1, 0.11, 0.12]).verdict == "above"
    assert interval([-0.1, -0.11, -0.12]).verdict == "below"


def row(method: str, repair: bool, share: float, value: float, seed: int) -> dict[str, Any]:
    common = {"task": "scenes", "method": method, "seed": seed, "repair": repair, "share": share}
    return {**common, "val": value, "test": value, "collapsed": value < 0.3}


def study(default: float) -> Results:
    """Return results where dense is 0.8, the best criterion 0.6, thin 0.55, and random 0.2 without repair."""
    scores = {("LAMP", True): 0.6, ("uniform L2", True): 0.58, ("random", True): 0.5, ("random", False): 0.2}
    scores |= {(DEFAULT, True): default, (THIN, False): 0.55, ("output energy", True): 0.57}
    rows = [
        row(*key, share, value + seed / 1000, seed)
        for seed in (1, 2)
        for share in STAGES
        for key, value in scores.items()
    ]
    return Results([*rows, *(row("LAMP", True, 1.0, 0.8 + seed / 1000, seed) for seed in (1, 2))])


def test_answers_say_what_misses_its_aim():
    text = "\n".join(answers(study(default=0.52)))
    assert "has place 4 of 5 repaired criteria" in text
    assert "The aim, among the first 3, is missed." in text
    assert "Without repair, all criteria: 2 of 2 at 50%" in text
    assert "No repaired criterion collapsed at 50 or 26 %" in text
    assert "10%: +0.300 [+0.300, +0.300] (2 of 2 pairs up)" in text
    assert "The thin network is level or better at 26%, 10%, 5%: aim missed." in text
    assert "Missed: level at 26 %, at most 0.02 below at 10 %." in text


def test_answers_say_nothing_of_missed_aims_that_are_met():
    text = "\n".join(answers(study(default=0.81)))
    assert "has place 1 of 5 repaired criteria" in text
    assert "issed" not in text


def test_runs_with_longer_training_are_reported_apart_and_thin_networks_keep_their_rates():
    longer = [{**row(DEFAULT, True, share, 0.9, 1), "task": "scenes-long"} for share in (1.0, *STAGES)]
    rows = [row(DEFAULT, True, share, 0.5, 1) for share in (1.0, *STAGES)]
    text = page(
        {"date": "today", "versions": {}, "machine": "one"},
        Results(rows),
        Results([*rows, *longer]).of_length(True),
    )
    main_part, long_part = text.split("## With longer training")
    assert "0.900" not in main_part
    assert "| **IPAD energy, omega 0.25, repaired** | 0.900 |" in long_part.split("## Directly after")[0]
    assert {job[1] for job in longer_jobs(TASKS, NAMES, [1])} == set(LONG)
    assert make_task("scenes", "small").scratch_rates == (8e-3, 8e-3, 8e-3, 8e-3)
