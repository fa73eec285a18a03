"""Operators that need a multiple of channels: plans keep it, other cuts are refused before anything is changed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from lightning_prune import Limits, SurgeryError, prune_, select, trace
from lightning_prune.graph.channel_graph import Multiple
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.unit_pool import UnitPool
from lightning_prune.testing import with_zeroed_consumers

TOKENS = torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(0))
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def traced():
    net = mixtral()
    return net, trace(net, input_ids=TOKENS)


def test_plan_keeps_multiples_of_the_experts_channels(traced):
    net = copy.deepcopy(traced[0])
    graph = trace(net, input_ids=TOKENS)
    importance = np.random.default_rng(0).random(graph.num_units)
    plan = select(graph, importance, {"params": 0.6}, limits=Limits(1.0, min_channels=1))
    assert plan.reached
    prune_(net, graph, plan)
    experts = net.model.layers[0].mlp.experts
    groups, neurons, width = (
        experts.gate_up_proj.shape[0],
        experts.down_proj.shape[2],
        experts.down_proj.shape[1],
    )
    assert groups == 4  # no expert that the router did not choose is lost
    assert neurons < 64
    assert neurons % 8 == width % 8 == 0
    assert net(TOKENS).logits.shape == (1, 7, 50)


def test_neurons_of_all_experts_are_removed_together(traced):
    net = copy.deepcopy(traced[0])
    graph = trace(net, input_ids=TOKENS)
    units = graph.layers[EXPERTS][:8]  # of the gates; their other halves share the units
    dense = with_zeroed_consumers(copy.deepcopy(net), graph, units)
    prune_(net, graph, units)
    for tokens in (
        TOKENS,
        TOKENS.flip(1),
        torch.arange(30)[None],
    ):  # other experts than those of the example, too
        torch.testing.assert_close(net(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-5)


def test_other_numbers_are_refused_before_the_cut_with_their_units(traced):
    net, graph = traced
    units = graph.layers[EXPERTS][:3]
    with pytest.raises(
        SurgeryError, match=r"61 channels would remain at .*, which needs a multiple of 8"
    ) as error:
        prune_(net, graph, units)
    assert set(units.tolist()) < set(error.value.units.tolist())
    assert net.model.layers[0].mlp.experts.down_proj.shape == (4, 32, 64)


@pytest.mark.parametrize(("multiple", "required", "batches"), [(1, 4, [4, 4]), (3, 2, [4, 6]), (8, 3, [12])])
def test_batches_keep_both_multiples(multiple, required, batches):
    width = {3: 16, 8: 20}.get(multiple, 12)
    net = nn.Sequential(nn.Conv2d(1, width, 1), nn.Conv2d(width, 1, 1))
    graph = trace(net, torch.zeros(1, 1, 4, 4))
    graph.multiples.append(Multiple(graph.layers["0.weight"], required, "test"))
    pool = UnitPool(graph, Limits(1.0, min_channels=1), DenseSizes.of(graph), multiple)
    taken = [len(pool.offer(unit)) for unit in range(width)]
    assert [number for number in taken if number] == batches
