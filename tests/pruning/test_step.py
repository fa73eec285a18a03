"""Tests of one pruning step without Lightning, and of a new selection when surgery refuses units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import SurgeryError, prune_, trace
from lightning_prune.criteria import L2, CostAware, Normalised, Propagated, TaylorGate, TaylorWeight, blind_to
from lightning_prune.graph.costs import Term
from lightning_prune.pruning import step
from lightning_prune.pruning.cut_summary import CutSummary, budget_warning, size_metrics
from lightning_prune.pruning.session import PruningSession
from lightning_prune.pruning.step import cut_, importance_of
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.utils import distributed
from tests.support.nets import assert_same, state

EXAMPLE = (torch.zeros(1, 3, 8, 8),)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))


@pytest.fixture
def session() -> PruningSession:
    model = network()
    graph = trace(model, *EXAMPLE)
    return PruningSession(model, (EXAMPLE, {}), graph, DenseSizes.of(graph))


def test_cuts_in_steps_reach_the_budget_and_have_the_predicted_costs(session):
    policy = PruningPolicy({"macs": 0.4}, {"macs": 0.2}, Limits(1.0))
    while not policy.is_met(session.graph, session.dense):
        before = session.graph
        record = session.cut_(policy, L2())
        assert record
        cut = CutSummary.between(before, session.graph, session.dense, session.stopped, 0, 0.0)
        assert cut.after == {resource: session.graph.cost(resource) for resource in cut.after}
        assert cut.filters == len(session.last_plan)
    assert size_metrics(session.graph, session.dense)["prune/macs_share"] <= 0.4


def test_units_that_surgery_refuses_stay_and_others_are_removed(session, monkeypatch):
    first = int(session.graph.layers["0.weight"][0])

    def refuse(model, graph, remove, optimizers=()):
        if first in remove:
            raise SurgeryError("view at line 1", np.array([first]))
        return prune_(model, graph, remove, optimizers)

    monkeypatch.setattr(step, "prune_", refuse)

    def lowest(graph, model, statistics):
        return np.arange(graph.num_units, dtype=float)

    with pytest.warns(UserWarning, match="view at line 1; 1 unit of 0.weight stays, selecting again"):
        plan, record = cut_(
            session.target, session.graph, PruningPolicy({"macs": 0.6}), lowest, {}, session.dense
        )
    assert first not in list(plan)
    assert record.kept["0.weight"][0][0] == 0


def test_a_network_that_surgery_cannot_cut_stays_unchanged_with_a_warning(session, monkeypatch):
    def refuse(model, graph, remove, optimizers=()):
        raise SurgeryError("cannot be proven")

    monkeypatch.setattr(step, "prune_", refuse)
    before = [p.clone() for p in session.target.parameters()]
    with pytest.warns(UserWarning, match="no more cuts, the network stays unchanged: cannot be proven"):
        assert not session.cut_(PruningPolicy({"macs": 0.6}), L2())
    assert session.exhausted
    assert all(torch.equal(a, b) for a, b in zip(before, session.target.parameters(), strict=True))


def test_every_process_carries_out_the_plan_of_rank_0(session, monkeypatch):
    other = session.graph.layers["2.weight"][:2]
    monkeypatch.setattr(step, "broadcast", lambda plan: replace(plan, remove=other))
    plan, record = cut_(session.target, session.graph, PruningPolicy({"macs": 0.6}), L2(), {}, session.dense)
    assert list(plan) == other.tolist()
    assert set(record.kept) == {"2.weight", "2.bias", "4.weight"}


def test_a_cut_that_differs_between_processes_raises(session, monkeypatch):
    monkeypatch.setattr(distributed, "gather_all", lambda digest: [digest, "another"])
    with pytest.raises(RuntimeError, match=r"the cut of ranks \[1\] differs from that of rank 0"):
        session.cut_(PruningPolicy({"macs": 0.6}), L2())


def test_the_budget_warning_explains_why_pruning_ended(session):
    policy = PruningPolicy({"macs": 0.3}, None, Limits(0.5))
    session.cut_(policy, L2())
    assert session.exhausted
    text = budget_warning(policy, session.graph, session.dense, session.last_plan)
    assert "loosen limits" in text
    assert f"macs {session.graph.cost('macs') / session.dense.costs['macs']:.3f}" in text


def wide_early_deep_late() -> PruningSession:
    """Return a session whose first layers have most of the MACs, and its last layers most of the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(16),
        nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 2, 1),
    )  # fmt: skip
    example = (torch.zeros(1, 3, 32, 32),), {}
    graph = trace(model, *example[0])
    return PruningSession(model, example, graph, DenseSizes.of(graph))


def equal_scores(graph, model, statistics):
    return np.ones(graph.num_units)


BOTH = CostAware(equal_scores, resources={"macs": 1.0, "params": 0.2})


@pytest.mark.parametrize("criterion", [BOTH, Normalised(BOTH, "global"), Propagated(BOTH, 0.0)])
def test_a_resource_whose_budget_is_met_no_longer_affects_the_ranking(criterion):
    session = wide_early_deep_late()
    policy = PruningPolicy({"macs": 0.5, "params": 0.4}, {"macs": 0.3, "params": 0.3}, Limits(1.0))
    while policy.met_resources(session.graph, session.dense) != {"macs"}:
        session.cut_(policy, criterion)
        assert session.stopped == "amount"
        assert (
            session.graph.widths()["4.weight"] == 64
        )  # MACs have the larger weight, and the first layers have most of them
    first = session.graph.widths()["0.weight"]
    assert first < 8
    while not policy.is_met(session.graph, session.dense):
        assert session.cut_(policy, criterion)
    assert session.graph.widths()["0.weight"] == first
    assert session.graph.widths()["4.weight"] < 64


def test_without_remaining_costs_importance_alone_decides():
    session = wide_early_deep_late()
    assert blind_to(BOTH, ["macs", "params"]) is equal_scores
    assert blind_to(BOTH, ["macs"]) == CostAware(equal_scores, resources={"params": 0.2})
    assert blind_to(BOTH, ["elsewhere"]) == BOTH
    assert blind_to(equal_scores, ["macs"]) is equal_scores
    assert importance_of(
        Propagated(BOTH), session.graph, session.target, {}, ["macs", "params"]
    ) == pytest.approx(Propagated(equal_scores)(session.graph, session.target))


def test_a_unit_that_saves_nothing_is_not_removed_first():
    """A regression: a saved cost of 0 was treated like the cost of the whole network."""
    session = wide_early_deep_late()

    def only_first(graph):
        return [Term("0.weight", 1, (graph.layers["0.weight"],))]

    graph = session.graph.with_resources({"first": only_first})
    scores = CostAware(equal_scores, resources={"first": 1.0})(graph, session.target)
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
def test_a_criterion_that_returns_invalid_importance_changes_nothing(session, criterion, message):
    before = state(session.target)
    with pytest.raises(ValueError, match=message) as raised:
        session.cut_(PruningPolicy({"macs": 0.6}), criterion)
    assert any("criterion: " in note and "nothing was cut" in note for note in raised.value.__notes__)
    assert_same(state(session.target), before)
    assert not session.exhausted
