"""Tests of plans in which residual blocks vanish besides channels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import (
    L2,
    DepthSettings,
    Limits,
    PruningPolicy,
    SurgeryError,
    block_scores,
    one_shot,
    prune_,
    residual_blocks,
    select_with_depth,
    trace,
)
from lightning_prune.classification.networks.cifar_resnet import CifarResNet
from lightning_prune.criteria.branch_watch import watched_branches
from lightning_prune.graph.block_costs import units_of_block
from lightning_prune.graph.block_search import blocks_of
from lightning_prune.pruning.block_scorer import BlockScorer
from lightning_prune.pruning.calibration import first_batches
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.depth_settings import candidate_blocks

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def resnet(depth: int = 20) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(depth=depth, in_channels=3, width=8).eval()


@pytest.fixture(scope="module")
def graph():
    return trace(resnet(), IMAGES)


def test_a_worthless_block_goes_and_a_precious_one_stays(graph):
    scores = dict.fromkeys(blocks_of(graph), 10.0) | {"blocks.4": 1e-9}
    plan = select_with_depth(graph, np.ones(graph.num_units), scores, {"macs": 0.6})
    assert plan.blocks == ("blocks.4",)
    assert plan.reached
    assert not np.isin(plan.remove, units_of_block(graph, "blocks.4")).any()


def test_the_costs_of_a_plan_are_those_of_the_network_that_it_leaves():
    net = resnet()
    graph = trace(net, IMAGES)
    scores = dict.fromkeys(blocks_of(graph), 1e-9)
    plan = select_with_depth(graph, L2()(graph, net), scores, {"macs": 0.5}, DepthSettings(blocks=3))
    prune_(net, graph, plan)
    smaller = trace(net, IMAGES)
    assert {name: change.after for name, change in plan.costs.items()} == {
        name: smaller.cost(name) for name in plan.costs
    }
    assert plan.costs["macs"].before == graph.cost("macs")
    assert len(blocks_of(smaller)) == len(blocks_of(graph)) - 3


def test_the_summary_knows_the_blocks(graph):
    scores = dict.fromkeys(blocks_of(graph), 10.0) | {"blocks.4": 1e-9}
    plan = select_with_depth(graph, np.ones(graph.num_units), scores, {"macs": 0.6})
    summary = plan.summary()
    channels = {layer.name: layer.channels.after for layer in summary.layers}
    assert channels["blocks.4.conv1"] == channels["blocks.4.conv2"] == 0
    assert min(number for name, number in channels.items() if "blocks.4." not in name) > 0
    assert summary.totals["macs"].after == plan.costs["macs"].after
    assert "gone as a whole: 1 block, blocks.4" in summary.text(width=80)
    assert "blocks.4" in summary.html()
    assert "blocks.4" in summary.json()
    assert str(plan).startswith("1 block · ")


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (DepthSettings(max_depth_ratio=0), 0),
        (DepthSettings(max_depth_ratio=0.3), 2),
        (DepthSettings(max_depth_ratio=1, min_blocks=1), 4),
        (DepthSettings(max_depth_ratio=1, exclude=["blocks.0", "blocks.1"]), 5),
        (DepthSettings(max_depth_ratio=1, include=["blocks.2"]), 1),
    ],
)
def test_limits_and_patterns_hold(graph, settings, most):
    scores = dict.fromkeys(blocks_of(graph), 1e-12)
    dense = DenseSizes.of(graph)  # so that a plan that does not meet the budget is returned
    options = {"limits": Limits(layers=0.01, min_channels=8), "dense": dense}  # next to no channel may go
    plan = select_with_depth(graph, np.ones(graph.num_units), scores, {"macs": 0.01}, settings, **options)
    assert len(plan.blocks) <= most
    exact = replace(settings, blocks=most)
    plan = select_with_depth(graph, np.ones(graph.num_units), scores, {"macs": 0.01}, exact, **options)
    assert len(plan.blocks) == most
    more = replace(settings, blocks=most + 1)
    with pytest.raises(
        ValueError, match=f"{most + 1} blocks are to vanish, but limits and exclusions leave {most}"
    ):
        select_with_depth(graph, np.ones(graph.num_units), scores, {"macs": 0.01}, more, **options)


def test_a_block_that_cannot_vanish_is_refused_by_name_and_left_out_by_glob(graph):
    for name in ("blocks.3", "blocks.6"):
        with pytest.raises(ValueError, match=f"'{name}' cannot vanish: its shortcut is computed by a layer"):
            candidate_blocks(blocks_of(graph), DepthSettings(include=[name, "blocks.1"]))
    assert candidate_blocks(blocks_of(graph), DepthSettings(include=["blocks.[34]"])) == ["blocks.4"]


def test_patterns_that_match_nothing_are_answered(graph):
    with pytest.raises(ValueError, match="exclude 'layer9' matches no residual block; there are blocks"):
        candidate_blocks(blocks_of(graph), DepthSettings(exclude=["layer9"]))
    with pytest.raises(ValueError, match="leave no residual block"):
        candidate_blocks(blocks_of(graph), DepthSettings(exclude=["*"]))


def test_a_network_without_blocks_says_so():
    plain = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), IMAGES)
    with pytest.raises(ValueError, match=r"no residual block can vanish .*adds no branch"):
        candidate_blocks(blocks_of(plain), DepthSettings())


@pytest.mark.parametrize(
    "wrong",
    [
        {"score": "best"},
        {"compare": "both"},
        {"max_depth_ratio": 1.5},
        {"min_blocks": -1},
        {"blocks": -1},
        {"images": 0},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"score of blocks|compare|max_depth_ratio|0 or more"):
        DepthSettings(**wrong)


@pytest.mark.parametrize("method", ["outputs", "kl", "energy", "taylor"])
def test_a_branch_of_zeros_scores_zero_and_is_the_least_important(method):
    net = resnet()
    nn.init.zeros_(net.blocks[4].bn2.weight), nn.init.zeros_(net.blocks[4].bn2.bias)
    scores = block_scores(
        residual_blocks(net, IMAGES), [IMAGES], method, lambda network, batch: network(batch).square().mean()
    )
    assert scores["blocks.4"] == pytest.approx(0, abs=1e-9)
    assert all(score > 1e-7 for name, score in scores.items() if name != "blocks.4")


def test_scores_are_what_they_say():
    net = resnet()
    blocks = residual_blocks(net, IMAGES)
    seen = {}
    with (
        torch.no_grad(),
        watched_branches(blocks, blocks, lambda name, x, b: seen.update({name: (x + 0, b + 0)})),
    ):
        dense = net(IMAGES)
    energy = block_scores(blocks, [IMAGES], "energy")
    for name, (stream, branch) in seen.items():
        assert energy[name] == pytest.approx(float(branch.square().sum() / (stream + branch).square().sum()))
    with torch.no_grad(), watched_branches(blocks, ["blocks.4"], lambda name, x, b: 0 * b):
        change = float((net(IMAGES) - dense).square().mean() / dense.var(correction=0))
    assert block_scores(blocks, [IMAGES])["blocks.4"] == pytest.approx(change, rel=1e-5)


def test_limits_and_exclusions_may_name_layers_of_blocks_that_vanish():
    net = resnet()
    graph = trace(net, IMAGES)
    rules = {
        "limits": Limits(overrides={"blocks.4.conv1": 0.5, "blocks.1": {"share": 0.9}}),
        "exclude": ["blocks.4.conv2"],
    }
    scores = dict.fromkeys(blocks_of(graph), 10.0) | {"blocks.4": 1e-9}
    plan = select_with_depth(graph, L2()(graph, net), scores, {"macs": 0.7}, **rules)
    assert plan.blocks == ("blocks.4",)
    prune_(net, graph, plan)
    smaller = trace(net, IMAGES)  # the next cut of a training has the same rules
    assert select_with_depth(smaller, L2()(smaller, net), {}, {"macs": 0.8}, **rules).reached
    settings = DepthSettings(include=["blocks.4"], exclude=["blocks.4"])
    assert candidate_blocks(blocks_of(smaller), settings) == []
    with pytest.raises(ValueError, match=r"exclude 'blocks.4.conv9' matches no layer"):
        select_with_depth(smaller, L2()(smaller, net), {}, {"macs": 0.8}, exclude=["blocks.4.conv9"])


def test_the_plan_that_loses_least_is_taken_as_a_function_says(graph):
    scores, asked = dict.fromkeys(blocks_of(graph), 1.0), []

    def two_are_best(plan):
        asked.append(len(plan.blocks))
        return abs(len(plan.blocks) - 2)

    settings, dense = DepthSettings(max_depth_ratio=1), DenseSizes.of(graph)
    plan = select_with_depth(
        graph, np.ones(graph.num_units), scores, {"macs": 0.6}, settings, dense=dense, loss_of=two_are_best
    )
    assert len(plan.blocks) == 2
    assert sorted(asked) == list(range(8))
    only_seven = {"limits": Limits(layers=0.01, min_channels=8), "dense": dense}
    asked.clear()
    plan = select_with_depth(
        graph, np.ones(graph.num_units), scores, {"macs": 0.3}, settings, loss_of=two_are_best, **only_seven
    )
    assert plan.reached
    assert min(asked, default=len(plan.blocks)) > 2  # fewer do not meet the budget, and are not asked for


def test_of_many_numbers_of_blocks_few_are_compared():
    graph, asked = trace(resnet(depth=56), IMAGES), []

    def seventeen_are_best(plan):
        asked.append(len(plan.blocks))
        return (len(plan.blocks) - 17) ** 2

    scores, settings = dict.fromkeys(blocks_of(graph), 1.0), DepthSettings(max_depth_ratio=1)
    options = {"dense": DenseSizes.of(graph), "loss_of": seventeen_are_best}
    plan = select_with_depth(graph, np.ones(graph.num_units), scores, {"macs": 0.9}, settings, **options)
    assert len(plan.blocks) == 17
    assert len(asked) == len(set(asked)) < 16


def test_scores_decide_where_outputs_cannot_be_compared(graph):
    scores = dict.fromkeys(blocks_of(graph), 10.0) | {"blocks.4": 1e-9}
    arguments = (graph, np.ones(graph.num_units), scores, {"macs": 0.6})
    plan = select_with_depth(*arguments, loss_of=lambda plan: float("nan"))
    assert plan.blocks == select_with_depth(*arguments).blocks == ("blocks.4",)


def test_the_number_of_blocks_is_the_one_whose_repaired_network_changes_least():
    batches = [torch.rand(32, 3, 16, 16)]
    net = resnet()
    graph = trace(net, IMAGES[:1])
    scorer = BlockScorer(DepthSettings(), partial(first_batches, batches))
    scores, dense = scorer(graph), DenseSizes.of(graph)
    policy = PruningPolicy({"macs": 0.5}, depth=DepthSettings(max_depth_ratio=1))
    importance = L2()(graph, net)
    plans = [
        replace(policy, depth=replace(policy.depth, blocks=n)).plan(graph, importance, dense, scores)
        for n in range(8)
    ]
    changes = [scorer.change(graph, plan) for plan in plans if plan.reached]
    best = [plan for plan in plans if plan.reached][int(np.argmin(changes))]
    assert len(set(changes)) == len(changes) > 3
    record = one_shot(
        net,
        IMAGES[:1],
        {"macs": 0.5},
        L2(),
        batches,
        compensate=False,
        depth=DepthSettings(max_depth_ratio=1),
    )
    gone = [name for what in record.vanished.values() for name in what["blocks"]]
    assert sorted(gone) == sorted(best.blocks)
    by_scores = policy.plan(graph, importance, dense, scores)
    assert by_scores.blocks != best.blocks  # sums of scores let too few vanish


def test_a_cut_that_changes_no_output_loses_nothing_and_a_refused_one_everything(monkeypatch):
    net = resnet()
    nn.init.zeros_(net.blocks[4].bn2.weight), nn.init.zeros_(net.blocks[4].bn2.bias)
    graph = trace(net, IMAGES[:1])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    scorer = BlockScorer(DepthSettings(), partial(first_batches, [IMAGES]))
    plan = select_with_depth(
        graph, np.ones(graph.num_units), {"blocks.4": 0.0}, {"macs": 0.95}, DepthSettings(blocks=1)
    )
    assert (plan.blocks, len(plan.remove)) == (("blocks.4",), 0)
    assert scorer.change(graph, plan) == 0
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

    def refuse(*args, **kwargs):
        raise SurgeryError("no", np.array([0]))

    monkeypatch.setattr("lightning_prune.pruning.block_scorer.cut_and_compensate_", refuse)
    assert scorer.change(graph, plan) == float("inf")


def test_one_shot_with_depth():
    net = resnet()
    nn.init.zeros_(net.blocks[4].bn2.weight), nn.init.zeros_(net.blocks[4].bn2.bias)
    macs = trace(net, IMAGES).cost("macs")
    record = one_shot(net, IMAGES[:1], {"macs": 0.6}, L2(), [IMAGES], depth=DepthSettings(blocks=1))
    assert list(record.vanished) == ["blocks.4"]
    assert trace(net, IMAGES).cost("macs") <= 0.6 * macs
    again = record.apply_(resnet())
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(IMAGES), net.eval()(IMAGES))


def test_blocks_without_batches_are_refused():
    with pytest.raises(ValueError, match="depth needs batches"):
        one_shot(resnet(), IMAGES[:1], {"macs": 0.6}, depth=True)
