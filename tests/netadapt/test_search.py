"""Searches: the candidate that is kept, any number of workers, processes that die, alignment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import OptimalSelection, load_pruned, trace
from lightning_prune.criteria import IPAD, TaylorGate, TaylorWeight
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.netadapt.alignment import least_surplus_units, surplus_units
from lightning_prune.netadapt.rounds import Rounds
from lightning_prune.netadapt.workers import Workers
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.utils.seeding import random_state
from tests.support.netadapt_search import RULES, THREE, TRAINING, build, error, loss, run_search

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
TWO = Workers(n_jobs=2)


def same(a: Any, b: Any) -> bool:
    """Return whether two states are equal bit by bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def rounds_of(result: Any) -> list[dict[str, Any]]:
    """Return the rounds of a result, without their duration."""
    return [{**vars(item), "seconds": 0} for item in result.rounds]


@pytest.fixture(scope="module")
def one_worker() -> Any:
    torch.set_num_threads(1)
    return run_search()


def test_every_round_gives_its_reduction_and_the_record_holds_every_cut(one_worker):
    net, result = one_worker
    graph = trace(net, torch.zeros(1, 1, 8, 8))
    assert result.reached
    assert [item.number for item in result.rounds] == [1, 2, 3]
    shares = [1.0] + [item.share["macs"] for item in result.rounds]
    for (before, after), reduction in zip(pairwise(shares), THREE.reductions(0.5), strict=True):
        assert after <= before - reduction + 1e-9 or after <= 0.5
    dense = trace(build(), torch.zeros(1, 1, 8, 8)).cost("macs")
    assert (
        graph.cost("macs") == result.rounds[-1].cost["macs"] == round(result.rounds[-1].share["macs"] * dense)
    )
    again = result.record.apply_(build())
    again.load_state_dict(net.state_dict())
    assert error(again.eval(), TRAINING.batches) == error(net.eval(), TRAINING.batches)


def test_the_candidate_with_the_smallest_loss_per_resource_is_kept(one_worker):
    _, result = one_worker
    dense = trace(build(), torch.zeros(1, 1, 8, 8)).cost("macs")
    first = result.rounds[0]
    assert len(first.metrics) > 1
    best = min(first.metrics, key=lambda name: first.metrics[name])
    saved = dense - first.cost["macs"]
    lost = first.after - first.before
    if lost <= 0:
        assert first.block == best
    else:  # a candidate with a better metric must have saved less
        assert all(m >= first.after or saved > 0 for m in first.metrics.values())
    _, by_metric = run_search(rounds=replace(THREE, by="metric"))
    for each in by_metric.rounds:
        assert each.after == min(each.metrics.values()) == each.metrics[each.block]


def test_two_workers_give_the_same_bits_as_one(one_worker):
    net, result = run_search(workers=TWO)
    assert same(net.state_dict(), one_worker[0].state_dict())
    assert same(result.optimizer, one_worker[1].optimizer)
    assert rounds_of(result) == rounds_of(one_worker[1])


def test_a_search_restores_random_generators_threads_and_modes():
    torch.manual_seed(3)
    net = build()
    before, threads = random_state(), torch.get_num_threads()
    _, result = run_search()
    torch.manual_seed(0)
    assert torch.get_num_threads() == threads
    assert result.reached
    net, _ = run_search()
    assert all(module.training for module in net.modules())
    assert same(random_state()["numpy"], before["numpy"])


DENSE = 8, 12, 8


def deadly_loss(net: nn.Module, batch: Any, always: int, once: int, flag: str) -> Tensor:
    """Kill the process for the block of layer ``always``, and the first time for that of layer ``once``."""
    cut = [i for i, width in enumerate(DENSE) if net[3 * i].out_channels < width]
    if cut == [always] or (cut == [once] and not Path(flag).exists()):
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(net, batch)


def test_a_candidate_that_kills_its_worker_is_repeated_once_then_dropped_and_does_not_affect_others(tmp_path):
    rules, one = replace(RULES, budget={"macs": 0.8}), Rounds(rounds=1, steps=2)
    _, undisturbed = run_search(rules=rules, rounds=one)
    training = replace(TRAINING, loss=partial(deadly_loss, always=1, once=0, flag=str(tmp_path / "flag")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, result = run_search(training, TWO, one, rules)
    messages = [str(each.message) for each in caught]
    assert "a worker died (TerminatedWorkerError); without a result: " in messages[0]
    assert "the candidate of block '3' is dropped: its process died twice" in messages
    assert sum("is dropped" in message for message in messages) == 1
    metrics = result.rounds[0].metrics
    assert np.isnan(metrics.pop("3"))
    assert metrics == {name: m for name, m in undisturbed.rounds[0].metrics.items() if name != "3"}
    assert result.rounds[0].block != "3"


def test_an_error_in_the_loss_is_raised_unchanged():
    def broken(net: nn.Module, batch: Any) -> Tensor:
        raise KeyError("no such batch")

    with pytest.raises(KeyError, match="no such batch"):
        run_search(replace(TRAINING, loss=broken), TWO)


def test_a_killed_search_continues_at_its_round_and_ends_with_the_same_bits(one_worker, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, str(SUPPORT / "netadapt_search.py"), str(tmp_path)],
        env=environment,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert [each["number"] for each in json.loads((tmp_path / "history.json").read_text())] == [1, 2]
    lines: list[str] = []
    net, result = run_search(folder=tmp_path, report=lines.append)
    assert lines[0].startswith("continuing after round 2")
    assert [line.split(":")[0] for line in lines[1:]] == ["round 3/3"]
    assert same(net.state_dict(), one_worker[0].state_dict())
    assert rounds_of(result) == rounds_of(one_worker[1])
    assert same(load_pruned(build(), tmp_path / "state.pt").state_dict(), net.state_dict())


def test_the_folder_of_another_search_is_refused(tmp_path):
    run_search(folder=tmp_path, rounds=replace(THREE, rounds=1))
    net = build()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"holds another search \(its rounds differ\)"):
        run_search(folder=tmp_path)
    assert same(net.state_dict(), before)


@pytest.mark.parametrize(
    "criterion", [IPAD(omega=0.5), TaylorWeight(), TaylorGate()], ids=lambda c: type(c).__name__
)
def test_criteria_that_need_activations_and_gradients(criterion):
    _, result = run_search(rounds=Rounds(rounds=2, steps=1, criterion=criterion))
    assert result.reached


def test_a_budget_in_a_custom_resource():
    from lightning_prune.graph.layer_costs import LayerCost

    area = LayerCost(lambda layer, inside, outside: inside * outside, scale=1)
    net, result = run_search(rules=PruningPolicy({"area": 0.6}, limits=Limits(0.9), resources={"area": area}))
    graph = trace(net, torch.zeros(1, 1, 8, 8)).with_resources({"area": area})
    assert graph.cost("area") == result.rounds[-1].cost["area"] <= 0.6 * (8 + 96 + 96 + 8)


@pytest.mark.parametrize(
    ("rules", "rounds", "message"),
    [
        (PruningPolicy({"macs": 1.5e9}), THREE, "already meets the budget"),
        (PruningPolicy({"macs": 0.0}), THREE, "budget"),
        (PruningPolicy({"macs": 0.5, "params": 0.5}), THREE, "one resource"),
        (RULES, Rounds(reduction=0.01, decay=0.9), "sum up to 0.1 of the dense network"),
        (
            replace(RULES, budget={"macs": 0.2}),
            Rounds(rounds=1),
            "no block can give 80.0% of the macs alone; the most",
        ),
        (RULES, replace(THREE, blocks=["0", "nothing"]), "block 'nothing' matches no layer"),
        (RULES, replace(THREE, blocks=["10"]), "holds no layer that can be pruned"),
        (replace(RULES, exclude=["*"]), THREE, "exclude"),
        (replace(RULES, limits=Limits(0.1)), THREE, "cannot be met"),
    ],
)
def test_invalid_input_is_refused_and_the_model_is_not_changed(rules, rounds, message, monkeypatch):
    net = build()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    monkeypatch.setattr("tests.support.netadapt_search.build", lambda: net)
    with pytest.raises(ValueError, match=message):
        run_search(rules=rules, rounds=rounds)
    assert same(net.state_dict(), before)


@pytest.mark.parametrize("arguments", [{"n_jobs": 0}, {"threads": 0}, {"devices": []}, {"devices": [99]}])
def test_invalid_workers_are_refused(arguments):
    with pytest.raises(ValueError, match="device"):
        Workers(**arguments)


def test_a_search_that_cannot_reach_the_budget_ends_with_a_warning():
    rules = PruningPolicy({"macs": 0.45}, limits=Limits(overrides={"0": 0.5, "3": 0.4, "6": 0.4}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, result = run_search(rules=rules, rounds=Rounds(reduction=0.1, decay=1.0, steps=0))
    assert result.reached or any("the search ends above the budget" in str(each.message) for each in caught)


def test_candidates_continue_with_the_optimizer_of_the_training(one_worker):
    net = build()
    optimizer = TRAINING.optimizer(net)
    loss(net, TRAINING.batches[0]).backward()
    optimizer.step()
    _, result = run_search(optimizer=optimizer.state_dict())
    steps = {float(state["step"]) for state in result.optimizer["state"].values()}
    assert steps == {1.0 + 2 * len(result.rounds)}
    fresh = {float(state["step"]) for state in one_worker[1].optimizer["state"].values()}
    assert fresh == {2.0 * len(result.rounds)}


def widths(net: nn.Module) -> list[int]:
    return [net[i].out_channels for i in (0, 3, 6)]


def test_widths_are_rounded_down_at_the_end_within_the_tolerance(one_worker, tmp_path):
    plain, before = one_worker
    assert any(width % 4 for width in widths(plain))
    lines: list[str] = []
    net, result = run_search(
        rounds=replace(THREE, align=4, tolerance=None), folder=tmp_path, report=lines.append
    )
    assert all(
        width % 4 == 0 and width <= plain_width
        for width, plain_width in zip(widths(net), widths(plain), strict=True)
    )
    assert [each.block for each in result.rounds[:3]] == [each.block for each in before.rounds]
    last = result.rounds[3]
    assert (last.block, last.steps) == ("(alignment)", 2 * len(last.metrics))
    assert lines[3].startswith("round 4/4: (alignment)")
    again = result.record.apply_(build())
    assert widths(again) == widths(net)
    resumed, resumed_result = run_search(rounds=replace(THREE, align=4, tolerance=None), folder=tmp_path)
    assert same(resumed.state_dict(), net.state_dict())
    assert rounds_of(resumed_result) == rounds_of(result)


@pytest.mark.parametrize(("tolerance", "largest_loss"), [(0.0, 0), (2.0, 2), (None, 99)])
def test_widths_stay_where_rounding_costs_more_than_the_tolerance(tolerance, largest_loss):
    width_as_metric = replace(TRAINING, evaluate=lambda net: float(sum(widths(net))), higher_is_better=True)
    _, result = run_search(width_as_metric, rounds=Rounds(rounds=2, steps=0, align=5, tolerance=tolerance))
    last = result.rounds[-1]
    assert last.block == "(alignment)"
    assert last.metrics
    assert last.before - last.after == last.removed <= largest_loss
    assert all(
        loss > largest_loss for loss in (last.before - m for m in last.metrics.values()) if not last.removed
    )


@pytest.mark.slow
def test_candidates_on_a_local_ray_give_the_same_bits():
    pytest.importorskip("ray")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SUPPORT / "ray_search.py")]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert "same bits True" in out.stdout, out.stderr


def test_an_optimal_alignment_finds_widths_that_units_one_by_one_miss():
    """Two layers share units 4 and 5. Unit by unit, each class would have to keep a multiple alone."""
    layers = {"a.w": np.arange(6), "b.w": np.arange(4, 10)}
    graph = ChannelGraph(10, {}, layers, {"a.w": 0, "b.w": 0}, {}, {"params": []})
    scores = np.array([1.0, 1, 5, 5, 1.5, 1.5, 5, 5, 1, 1])
    arguments: Any = (graph, scores, list(layers), 4, Limits(1.0, min_channels=1), DenseSizes.of(graph))
    assert surplus_units(*arguments) == []
    assert least_surplus_units(OptimalSelection(), *arguments) == [4, 5]
