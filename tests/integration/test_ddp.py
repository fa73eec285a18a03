"""Tests of two processes over gloo: both make the same cuts, and none hangs. FSDP and DeepSpeed are refused."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor

from lightning_prune import FilterPruningCallback
from lightning_prune.criteria.activation_deviation import activation_deviation
from tests.support.ddp_runs import LOOKING, RUNS, Found, scored

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "ddp_runs.py"
TRAINING = [name for name in RUNS if name not in ("apart", "resumed", "uneven and not limited")]


def start(folder: Path, script: Path = SCRIPT, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """Start a script in two processes, with the environment of a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    processes = []
    for rank in (0, 1):
        process = {"PYTHONPATH": str(ROOT), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **cluster, **process}
        with (folder / f"log {rank}").open("w") as log:
            command = [sys.executable, str(script), str(folder), *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return processes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Found]]:
    """Return the results of both ranks for each run."""
    folder = tmp_path_factory.mktemp("ddp")
    codes = [process.wait() for process in start(folder)]  # a guard in the script ends a run that hangs
    assert codes == [0, 0], "\n".join((folder / f"log {rank}").read_text()[-3000:] for rank in (0, 1))
    return {
        name: [torch.load(folder / f"{name} {rank}.pt", weights_only=False) for rank in (0, 1)]
        for name in RUNS
    }


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("name", TRAINING)
def test_ranks_make_the_same_cuts_and_have_equal_weights(results, name):
    first, second = results[name]
    assert first["kept"] == second["kept"]
    assert first["kept"]
    assert first["epochs"] == second["epochs"]
    assert first["weights"] == second["weights"]  # after every batch, to the last digit
    steps = len(first["weights"]) // (2 if name.startswith("accumulated") else 1)
    assert len(set(first["weights"])) >= steps  # weights change in every step
    parameters = {n: t for n, t in second["state"].items() if "running" not in n and "tracked" not in n}
    assert_equal(first["state"], parameters)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_penalty_of_slimming_is_the_documented_one_on_every_rank(results, rank):
    written, added = results["slimmed"][rank]["ends"]
    for name, parameter in written.items():
        torch.testing.assert_close(added[name], parameter, rtol=1e-4, atol=1e-5)
    assert results["slimmed"][0]["changes"] == results["slimmed"][1]["changes"]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("vanished")])
def test_branches_are_removed_on_both_ranks_and_training_continues(results, name):
    first, second = results[name]
    assert [first["kept"][f"0.branches.{branch}.0.weight"][0] for branch in (0, 2)] == [[], []]
    for rank in (first, second):
        whole, resumed = rank["ends"]
        assert resumed["kept"] == whole["kept"]
        assert whole["weights"][-len(resumed["weights"]) :] == resumed["weights"]
        assert sum(not tensor.numel() for tensor in whole["state"].values()) == 12
        for average in rank["averages"]:
            shapes = {key: tensor.shape for key, tensor in average.items()}
            assert shapes == {key: tensor.shape for key, tensor in whole["state"].items()}
    parameters = {key: t for key, t in second["averages"][0].items() if "running" not in key}
    assert_equal(first["averages"][0], parameters)


def test_the_same_residual_blocks_vanish_on_both_ranks_and_from_the_average(results):
    first, second = results["shallower"]
    assert first["vanished"] == second["vanished"]
    assert first["vanished"]
    assert first["average"].keys() == first["state"].keys()
    for name, tensor in first["state"].items():
        assert first["average"][name].shape == second["average"][name].shape == tensor.shape, name
    assert_equal(first["average"], {n: t for n, t in second["average"].items() if "running" not in n})


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_resumes_with_its_own_random_numbers_and_statistics(results, rank):
    whole, *others = results["resumed"][rank]["ends"]
    for other in others:
        assert other["kept"] == whole["kept"]
        assert other["epochs"] == whole["epochs"] == [1, 2]
        assert whole["weights"][-len(other["weights"]) :] == other["weights"]
    assert [len(other["weights"]) for other in others] == [10, 5]


def test_statistics_are_those_of_the_data_of_both_ranks(results):
    first, second = results["carry"]
    assert first["seen"] == second["seen"]
    mean_map = (first["first epoch"] + second["first epoch"]) / 32
    expected = activation_deviation(mean_map.flatten(1))
    np.testing.assert_allclose(first["seen"][0]["net.0.weight"], expected, rtol=1e-4)
    alone = activation_deviation(first["first epoch"].flatten(1) / 16)
    assert not np.allclose(first["seen"][0]["net.0.weight"], alone, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("carry", (False, False, False)),
        ("find_unused_parameters", (True, False, True)),
        ("static_graph", (False, True, False)),
        ("static_graph by hand", (False, True, False)),
    ],
)
def test_the_wrapper_keeps_its_settings(results, name, settings):
    assert results[name][0]["epochs"]
    assert set(results[name][0]["settings"]) == {settings}


@pytest.mark.parametrize("name", LOOKING)
def test_criteria_get_the_statistics_that_one_process_would_gather(results, name):
    first, second = results[name]
    assert first["seen"] == second["seen"]
    (alone, *_) = scored(name, 8, devices=1)["seen"]
    assert first["seen"][0].keys() == alone.keys()
    for key, values in alone.items():
        np.testing.assert_allclose(first["seen"][0][key], values, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize(("name", "expected"), [("steps", [3, 6, 9]), ("accumulated steps", [3, 6, 9])])
def test_cuts_by_optimizer_steps_come_at_the_same_steps_on_all_ranks(results, name, expected):
    assert [rank["steps"] for rank in results[name]] == [expected, expected]
    assert [len(rank["epochs"]) for rank in results[name]] == [3, 3]


def test_a_layer_that_one_rank_never_runs_does_not_block_the_other(results):
    assert "side.0.weight" in results["unseen"][0]["seen"][0]
    assert results["unseen"][0]["seen"] == results["unseen"][1]["seen"]


def test_recalibrated_norms_are_the_same_on_all_ranks(results):
    first, second = (rank["state"] for rank in results["uneven"])
    assert_equal(first, {name: tensor for name, tensor in second.items() if "running" in name})


def test_different_numbers_of_batches_are_refused_before_lightning_hangs(results):
    for rank in results["uneven and not limited"]:
        assert "ranks have 4, 3 training batches" in rank["error"]
        assert "Trainer(limit_train_batches=3)" in rank["error"]


def test_averages_are_equal_on_all_ranks(results):
    first, second = (rank["average"] for rank in results["averaged"])
    assert {name: t.shape for name, t in first.items()} == {
        name: t.shape for name, t in results["averaged"][0]["state"].items()
    }
    assert_equal(first, {name: tensor for name, tensor in second.items() if "running" not in name})


def test_repairs_are_the_same_on_all_ranks_and_after_a_resume(results):
    (whole, resumed), others = (rank["ends"] for rank in results["repaired"])
    assert whole["epochs"] == resumed["epochs"] == [1, 2]
    assert all(after < 0.5 * before for before, after in whole["changes"])
    assert whole["weights"][-len(resumed["weights"]) :] == resumed["weights"]
    assert len(resumed["weights"]) == 8
    for end in (resumed, *others):
        assert end["changes"] == whole["changes"]
        assert_equal(end["average"], {n: t for n, t in whole["average"].items() if "running" not in n})


@pytest.mark.parametrize("name", ["distilled", "distilled from another"])
def test_every_rank_has_the_same_teacher_to_the_end(results, name):
    first, second = (rank["teacher"] for rank in results[name])
    assert first == second
    assert len(set(first)) == 1
    assert results[name][0]["weights"] != results["carry"][0]["weights"]


def test_every_rank_has_the_network_of_the_first_before_its_first_cut_as_the_teacher(results):
    first, second = (rank["ends"] for rank in results["distilled from its own"])
    whole, *others = first
    for end in (*first, *second):
        assert set(end["teacher"]) == {whole["teacher"][0]}
    for other in others:
        assert whole["weights"][-len(other["weights"]) :] == other["weights"]
        assert other["kept"] == whole["kept"]


def test_one_rank_measures_latency_for_all_ranks(results):
    first, second = results["timed"]
    assert [first["builds"], second["builds"]] == [1, 0]
    assert first["table"] == second["table"]
    assert first["table"].entries


def test_a_latency_table_that_the_first_rank_cannot_read_ends_training_on_all_ranks(results):
    for rank in results["timed"]:
        assert "damaged 0.json is not JSON" in rank["error"]


def test_a_cut_that_only_one_rank_can_make_ends_training_on_all_ranks(results):
    for rank in results["apart"]:
        assert "the cut of ranks [1] differs from that of rank 0" in rank["error"]


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_sharded_parameters_are_refused_in_one_sentence(strategy):
    trainer: Any = SimpleNamespace(strategy=object.__new__(strategy))
    message = (
        rf"{strategy.__name__} shards or wraps parameters .* cannot be cut; use Trainer\(strategy=\"ddp\"\)"
    )
    with pytest.raises(NotImplementedError, match=message):
        FilterPruningCallback({"macs": 0.5}).setup(trainer, LightningModule(), "fit")


def ends(folder: Path, killed_rank: int) -> list[int]:
    """Run two processes of which one is killed (-1: none), and return their exit codes."""
    folder.mkdir(exist_ok=True)
    processes = start(folder, SCRIPT.with_name("ddp_killed.py"), str(killed_rank))
    try:
        return [process.wait(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_if_one_rank_is_killed_both_end_and_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, rank: int):
    assert ends(tmp_path / "whole", -1) == [0, 0]
    codes = ends(tmp_path / "run", rank)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] != 0
    assert ends(tmp_path / "run", -1) == [0, 0], (tmp_path / "run" / "log 0").read_text()[-3000:]
    for each in (0, 1):
        whole, resumed = (
            torch.load(tmp_path / name / f"result {each}.pt", weights_only=True) for name in ("whole", "run")
        )
        assert resumed["within_budget"]
        assert (resumed["record"], resumed["cuts"]) == (whole["record"], whole["cuts"])
        assert_equal(resumed["state"], whole["state"])
