"""One step of pruning, without Lightning: what is refused is selected around."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import SurgeryError, prune_, trace
from lightning_prune.criteria import L2, CostAware, Normalised, Propagated, TaylorGate, TaylorWeight, blind_to
from lightning_prune.graph.costs import Term
from lightning_prune.pruning import step as cutting
from lightning_prune.pruning.cut_summary import CutSummary, budget_warning, size_metrics
from lightning_prune.pruning.session import PruningSession
from lightning_prune.pruning.step import cut_, importance_of
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.utils import distributed as processes
from tests.support.nets import assert_same, state

EXAMPLE = (torch.zeros(1, 3, 8, 8),)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))


@pytest.fixture
def run() -> PruningSession:
    model = network()
    graph = trace(model, *EXAMPLE)
    return PruningSession(model, (EXAMPLE, {}), graph, DenseSizes.of(graph))


def test_cuts_in_steps_to_the_budget_with_every_cost_as_predicted(run):
    rules = PruningPolicy({"macs": 0.4}, {"macs": 0.2}, Limits(1.0))
    while not rules.is_met(run.graph, run.dense):
        before = run.graph
        record = run.cut_(rules, L2())
        assert record
        cut = CutSummary.between(before, run.graph, run.dense, run.stopped, 0, 0.0)
        assert cut.after == {resource: run.graph.cost(resource) for resource in cut.after}
        assert cut.filters == len(run.last_plan)
    assert size_metrics(run.graph, run.dense)["prune/macs_share"] <= 0.4


def test_units_that_surgery_refuses_stay_and_others_go(run, monkeypatch):
    first = int(run.graph.layers["0.weight"][0])

    def refusing(model, graph, remove, optimizers=()):
        if first in remove:
            raise SurgeryError("view at line 1", np.array([first]))
        return prune_(model, graph, remove, optimizers)

    monkeypatch.setattr(cutting, "prune_", refusing)

    def lowest(graph, model, statistics):
        return np.arange(graph.num_units, dtype=float)

    with pytest.warns(UserWarning, match="view at line 1; 1 units stay, selecting again"):
        plan, record = cut_(run.target, run.graph, PruningPolicy({"macs": 0.6}), lowest, {}, run.dense)
    assert first not in list(plan)
    assert record.kept["0.weight"][0][0] == 0


def test_a_network_that_surgery_cannot_cut_stays_with_a_warning(run, monkeypatch):
    def refusing(model, graph, remove, optimizers=()):
        raise SurgeryError("cannot be proven")

    monkeypatch.setattr(cutting, "prune_", refusing)
    before = [p.clone() for p in run.target.parameters()]
    with pytest.warns(UserWarning, match="no more cuts, the network stays unchanged: cannot be proven"):
        assert not run.cut_(PruningPolicy({"macs": 0.6}), L2())
    assert run.exhausted
    assert all(torch.equal(a, b) for a, b in zip(before, run.target.parameters(), strict=True))


def test_processes_carry_out_the_plan_of_the_first(run, monkeypatch):
    other = run.graph.layers["2.weight"][:2]
    monkeypatch.setattr(cutting, "broadcast", lambda plan: replace(plan, remove=other))
    plan, record = cut_(run.target, run.graph, PruningPolicy({"macs": 0.6}), L2(), {}, run.dense)
    assert list(plan) == other.tolist()
    assert set(record.kept) == {"2.weight", "2.bias", "4.weight"}


def test_a_cut_that_another_process_did_not_make_ends_training(run, monkeypatch):
    monkeypatch.setattr(processes, "gather_all", lambda digest: [digest, "another"])
    with pytest.raises(RuntimeError, match=r"the cut of ranks \[1\] differs from that of rank 0"):
        run.cut_(PruningPolicy({"macs": 0.6}), L2())


def test_the_end_is_explained(run):
    rules = PruningPolicy({"macs": 0.3}, None, Limits(0.5))
    run.cut_(rules, L2())
    assert run.exhausted
    text = budget_warning(rules, run.graph, run.dense, run.last_plan)
    assert "loosen limits" in text
    assert f"macs {run.graph.cost('macs') / run.dense.costs['macs']:.3f}" in text


def wide_early_deep_late() -> PruningSession:
    """The first layers have nearly all the MACs, the last ones nearly all the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(16),
        nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 2, 1),
    )  # fmt: skip
    example = (torch.zeros(1, 3, 32, 32),), {}
    graph = trace(model, *example[0])
    return PruningSession(model, example, graph, DenseSizes.of(graph))


def alike(graph, model, statistics):
    return np.ones(graph.num_units)


BOTH = CostAware(alike, resources={"macs": 1.0, "params": 0.2})


@pytest.mark.parametrize("criterion", [BOTH, Normalised(BOTH, "global"), Propagated(BOTH, 0.0)])
def test_a_budget_that_is_met_no_longer_drives_the_ranking(criterion):
    run = wide_early_deep_late()
    rules = PruningPolicy({"macs": 0.5, "params": 0.4}, {"macs": 0.3, "params": 0.3}, Limits(1.0))
    while rules.met_resources(run.graph, run.dense) != {"macs"}:
        run.cut_(rules, criterion)
        assert run.stopped == "amount"
        assert run.graph.widths()["4.weight"] == 64  # MACs matter more, and the first layers have them
    first = run.graph.widths()["0.weight"]
    assert first < 8
    while not rules.is_met(run.graph, run.dense):
        assert run.cut_(rules, criterion)
    assert run.graph.widths()["0.weight"] == first
    assert run.graph.widths()["4.weight"] < 64


def test_without_any_cost_left_importance_alone_decides():
    run = wide_early_deep_late()
    assert blind_to(BOTH, ["macs", "params"]) is alike
    assert blind_to(BOTH, ["macs"]) == CostAware(alike, resources={"params": 0.2})
    assert blind_to(BOTH, ["elsewhere"]) == BOTH
    assert blind_to(alike, ["macs"]) is alike
    assert importance_of(Propagated(BOTH), run.graph, run.target, {}, ["macs", "params"]) == pytest.approx(
        Propagated(alike)(run.graph, run.target)
    )


def test_a_unit_that_saves_nothing_is_not_the_first_to_go():
    """It was: a cost of 0 was divided by as if it were the whole network's."""
    run = wide_early_deep_late()

    def only_first(graph):
        return [Term("0.weight", 1, (graph.layers["0.weight"],))]

    graph = run.graph.with_resources({"first": only_first})
    scores = CostAware(alike, resources={"first": 1.0})(graph, run.target)
    assert scores[graph.layers["4.weight"]].min() >= scores[graph.layers["0.weight"]].max()


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda graph, model, statistics: np.zeros(3), r"must have shape \(\d+,\), one per unit; got \(3,\)"),
        (lambda graph, model, statistics: np.full(graph.num_units, np.nan), "importance is NaN for 16 units"),
        (lambda graph, model, statistics: {"0.weight": 1.0}, "one number per unit; got dict"),
        (lambda graph, model, statistics: "low", "one number per unit; got str"),
        (lambda graph, model, statistics: None, r"one per unit; got \(\)"),
        (TaylorWeight(), "gradient"),
        (CostAware(TaylorGate()), "gradient"),
        (CostAware(L2(), resources={"seconds": 1.0}), "unknown resource 'seconds'"),
    ],
    ids=["shape", "nan", "dict", "str", "none", "taylor_weight", "taylor_gate", "resource"],
)
def test_a_criterion_that_gives_no_importance_changes_nothing(run, criterion, message):
    before = state(run.target)
    with pytest.raises(ValueError, match=message) as raised:
        run.cut_(PruningPolicy({"macs": 0.6}), criterion)
    assert any("criterion: " in note and "nothing was cut" in note for note in raised.value.__notes__)
    assert_same(state(run.target), before)
    assert not run.exhausted
