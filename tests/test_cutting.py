"""One step of pruning, without Lightning: what is refused is selected around."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import SurgeryError, cutting, processes, prune_, trace
from lightning_prune.criteria import L2
from lightning_prune.cutting import Cut, Rules, Run, cut_, facts, unmet
from lightning_prune.limits import DenseSizes, Limits

EXAMPLE = (torch.zeros(1, 3, 8, 8),)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))


@pytest.fixture
def run() -> Run:
    model = network()
    graph = trace(model, *EXAMPLE)
    return Run(model, (EXAMPLE, {}), graph, DenseSizes.of(graph))


def test_cuts_in_steps_to_the_budget_with_every_cost_as_predicted(run):
    rules = Rules({"macs": 0.4}, {"macs": 0.2}, Limits(1.0))
    while not rules.met(run.graph, run.dense):
        before = run.graph
        record = run.cut_(rules, L2())
        assert record
        cut = Cut.of(before, run.last, 0, 0.0)
        assert cut.after == {resource: run.graph.cost(resource) for resource in cut.after}
        assert cut.filters == len(run.last)
    assert facts(run.graph, run.dense)["prune/macs_share"] <= 0.4


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
        plan, record = cut_(run.target, run.graph, Rules({"macs": 0.6}), lowest, {}, run.dense)
    assert first not in list(plan)
    assert record.kept["0.weight"][0][0] == 0


def test_a_network_that_surgery_cannot_cut_stays_with_a_warning(run, monkeypatch):
    def refusing(model, graph, remove, optimizers=()):
        raise SurgeryError("cannot be proven")

    monkeypatch.setattr(cutting, "prune_", refusing)
    before = [p.clone() for p in run.target.parameters()]
    with pytest.warns(UserWarning, match="no more cuts, the network stays as it is: cannot be proven"):
        assert not run.cut_(Rules({"macs": 0.6}), L2())
    assert run.exhausted
    assert all(torch.equal(a, b) for a, b in zip(before, run.target.parameters(), strict=True))


def test_processes_carry_out_the_plan_of_the_first(run, monkeypatch):
    other = run.graph.layers["2.weight"][:2]
    monkeypatch.setattr(cutting, "shared", lambda plan: replace(plan, remove=other))
    plan, record = cut_(run.target, run.graph, Rules({"macs": 0.6}), L2(), {}, run.dense)
    assert list(plan) == other.tolist()
    assert set(record.kept) == {"2.weight", "2.bias", "4.weight"}


def test_a_cut_that_another_process_did_not_make_ends_training(run, monkeypatch):
    monkeypatch.setattr(processes, "gathered", lambda digest: [digest, "another"])
    with pytest.raises(RuntimeError, match=r"the cut of ranks \[1\] is not that of rank 0"):
        run.cut_(Rules({"macs": 0.6}), L2())


def test_the_end_is_explained(run):
    rules = Rules({"macs": 0.3}, None, Limits(0.5))
    run.cut_(rules, L2())
    assert run.exhausted
    text = unmet(rules, run.graph, run.dense, run.last)
    assert "loosen limits" in text
    assert f"macs {run.graph.cost('macs') / run.dense.costs['macs']:.3f}" in text
