"""Tests that a network sharded over two real processes is pruned as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_prune import Pruner
from tests.support.sharded_runs import CASES, sharded_results, train

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return sharded_results(tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", list(CASES))
def test_losses_and_record_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    alone = train(name, 0, 1)
    for rank in ranks:
        sharded = rank["results"][name]
        assert sharded["record"] == alone["record"]
        assert sharded["cuts"] == alone["cuts"] > 1
        assert sharded["finished"]
        assert sharded["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert sharded["trained"] == alone["trained"]
        assert sharded["groups"] == alone["groups"]
        for kind in ("weights", "states"):
            assert sharded[kind].keys() == alone[kind].keys()
            for key, value in alone[kind].items():
                torch.testing.assert_close(sharded[kind][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", list(CASES))
def test_the_network_is_sharded_again_in_the_same_parts(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        classes = rank["results"][name]["classes"]
        assert [each for each in classes if each.startswith("FSDP")] == ["FSDPBranches", "FSDPSequential"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("too late", "ValueError: make the Pruner before fully_shard"),
        ("loaded too late", "ValueError: load the state of the Pruner before fully_shard"),
        ("gradients", "NotImplementedError: the criterion reads gradients"),
        ("not observed", "ValueError: TaylorGate needs statistics"),
        ("two dimensions", "NotImplementedError: parameters are sharded over several dimensions"),
    ],
)
def test_what_cannot_be_is_refused_with_advice(ranks: list[dict[str, Any]], what: str, message: str) -> None:
    assert all(rank["refusals"][what].startswith(message) for rank in ranks)


@pytest.mark.parametrize("name", ["FullyShardedDataParallel", "DeepSpeedEngine"])
def test_other_ways_of_sharding_are_refused(name: str) -> None:
    wrapper = type(name, (nn.Sequential,), {})(nn.Linear(4, 4))
    with pytest.raises(NotImplementedError, match=r"FSDP1 and DeepSpeed .* fully_shard"):
        Pruner(wrapper, torch.zeros(1, 4), {"macs": 0.5})
