"""Tests of ``lightning-prune netadapt`` and ``oneshot``, and of one-shot pruning without Lightning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lightning_prune import PruningRecord, trace
from lightning_prune.cli.config import conf_dir
from lightning_prune.cli.prune import main, prune_run, pruned_config
from lightning_prune.cli.train import run
from lightning_prune.criteria import IPAD, TaylorWeight
from lightning_prune.pruning.one_shot import one_shot
from lightning_prune.reporting.run_folder import NET, Summary
from lightning_prune.serialization.saving import load_pruned
from tests.support.netadapt_search import RULES, TRAINING, build, loss

EXAMPLE = torch.zeros(1, 1, 8, 8)
NO_FILES = ["logger=none", "checkpoint=none"]


@pytest.mark.parametrize("method", ["netadapt", "oneshot"])
def test_configuration_of_a_run_gets_another_pruning_method(tmp_path, method):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        OmegaConf.save(compose("config", ["prune=none", *NO_FILES, "seed=4"]), tmp_path / "config.yaml")
    config = pruned_config(tmp_path, tmp_path / "out", method, 3, ["prune.budget.macs=0.3"])
    assert config.prune.budget.macs == 0.3
    assert (config.prune.start_epoch, config.trainer.max_epochs, config.seed) == (0, 4, 4)
    with pytest.raises(ValueError, match="0 epochs or more"):
        pruned_config(tmp_path, tmp_path / "out", method, -1)


SMALL = ["net=ritnet", "net.width=4", "data.size=32", "data.slices_per_axis=6", "trainer=cpu", *NO_FILES]
NET_RUN = [*SMALL, "prune=none", "scheduler=cosine", "trainer.max_epochs=2", "latency_runs=0", "threads=1"]


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        run(compose("config", NET_RUN), folder)
    return folder


def net_of(folder: Path) -> torch.nn.Module:
    dense = instantiate(OmegaConf.load(folder / "config.yaml").net, _convert_="all")
    return load_pruned(dense, folder / NET)


@pytest.mark.parametrize("epochs", [0, 2])
@pytest.mark.parametrize("method", ["netadapt", "oneshot"])
def test_a_command_prunes_the_network_of_a_run(dense_run, tmp_path, capsys, method, epochs):
    small = ["prune.rounds.rounds=2", "prune.rounds.blocks=2"] if method == "netadapt" else []
    main(method, [str(dense_run), str(tmp_path), "--epochs", str(epochs), "prune.budget.macs=0.6", *small])
    output = capsys.readouterr().out
    assert "parameters, trained already" in output
    assert ("2 epochs after the cut" if epochs else "not at all · seed") in output
    assert "test mIoU" in output
    assert "of the MACs" in output
    summary = Summary.load(tmp_path)
    assert (summary.status, summary.epochs, len(summary.cuts)) == ("completed", epochs + 1, 1)
    assert summary.final.macs <= 0.6 * summary.dense.macs
    assert (summary.candidate_steps > 0) == (method == "netadapt")
    net_of(tmp_path)


def test_without_training_and_repair_the_kept_filters_keep_their_weights(dense_run, tmp_path):
    prune_run(dense_run, tmp_path, "oneshot", 0, ["prune.budget.macs=0.6", "prune.compensate=false"])
    dense, cut = net_of(dense_run), net_of(tmp_path)
    expected = PruningRecord.load(tmp_path / "record.json").apply_(dense).state_dict()
    for name, tensor in cut.state_dict().items():
        if "running" not in name and "tracked" not in name:  # those are estimated anew
            assert torch.equal(expected[name], tensor), name


def test_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"lightning-prune oneshot: .*config\.yaml"):
        main("oneshot", [str(tmp_path / "nothing"), str(tmp_path / "out")])


@pytest.mark.parametrize("criterion", [IPAD(omega=0.5), TaylorWeight()], ids=lambda c: type(c).__name__)
def test_one_shot_by_any_criterion(criterion):
    net = build()
    record = one_shot(net, EXAMPLE, RULES, criterion, TRAINING.batches, loss)
    assert trace(net, EXAMPLE).cost("macs") <= 0.5 * trace(build(), EXAMPLE).cost("macs")
    rebuilt = record.apply_(build())
    rebuilt.load_state_dict(net.state_dict())


def test_one_shot_by_gradients_needs_a_loss():
    net = build()
    with pytest.raises(ValueError, match="pass loss="):
        one_shot(net, EXAMPLE, RULES, TaylorWeight(), TRAINING.batches)
    assert net[0].out_channels == 8


def test_logs_and_checkpoints_are_written_to_the_new_folder(dense_run, tmp_path):
    config = OmegaConf.load(dense_run / "config.yaml")
    config.logger = {
        "csv": {"save_dir": "/moved/dense"},
        "tensorboard": {"save_dir": "/moved/dense", "name": "a"},
    }
    config.callbacks = {"best": {"dirpath": f"{dense_run}/checkpoints"}, "early": {"monitor": "val/loss"}}
    folder = tmp_path / "dense"
    folder.mkdir()
    OmegaConf.save(config, folder / "config.yaml")
    pruned = pruned_config(folder, tmp_path / "out", "oneshot", 0)
    assert {str(logger.save_dir) for logger in pruned.logger.values()} == {str(tmp_path / "out")}
    assert pruned.logger.tensorboard.name == "a"
    assert pruned.callbacks.best.dirpath == str(tmp_path / "out" / "checkpoints")
    assert pruned.callbacks.early.monitor == "val/loss"


@pytest.mark.parametrize("override", ["trainer.max_epochs=9", "prune=ipad", "data.size=64"])
def test_overrides_that_would_be_ignored_are_refused(dense_run, tmp_path, override):
    with pytest.raises(SystemExit, match=r"is neither prune\.KEY=VALUE nor prune/GROUP=OPTION"):
        main("netadapt", [str(dense_run), str(tmp_path), override])
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_pruned_twice_nor_into_itself(dense_run, tmp_path):
    before = (dense_run / "net.pt").read_bytes()
    with pytest.raises(SystemExit, match="is the folder of the run itself: give another folder"):
        main("oneshot", [str(dense_run), str(dense_run / ".." / dense_run.name)])
    prune_run(dense_run, tmp_path / "once", "oneshot", 0, ["prune.budget.macs=0.6"])
    with pytest.raises(SystemExit, match="is pruned already: give the run of the dense network"):
        main("oneshot", [str(tmp_path / "once"), str(tmp_path / "twice")])
    assert (dense_run / "net.pt").read_bytes() == before


@pytest.mark.parametrize("method", ["netadapt", "oneshot"])
def test_help_describes_the_command(method, capsys):
    with pytest.raises(SystemExit):
        main(method, ["--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "Prune the trained network of a run" in output
    assert "prune.budget.macs=0.3" in output
    assert f"conf/prune/{method}.yaml" in output
