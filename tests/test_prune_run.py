"""The network of a finished run, pruned by a command; and one shot without Lightning."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from searches import RULES, TRAINING, build, loss

from lightning_prune import trace
from lightning_prune.cli import conf_dir
from lightning_prune.criteria import IPAD, TaylorWeight
from lightning_prune.one_shot import one_shot
from lightning_prune.prune_run import pruned_config

EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.mark.parametrize("method", ["netadapt", "oneshot"])
def test_the_configuration_of_a_run_with_another_way_to_prune(tmp_path, method):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        OmegaConf.save(compose("config", ["prune=none", "logger=none", "seed=4"]), tmp_path / "config.yaml")
    config = pruned_config(tmp_path, tmp_path / "out", method, 3, ["prune.budget.macs=0.3"])
    assert config.prune.budget.macs == 0.3
    assert (config.prune.start_epoch, config.trainer.max_epochs, config.seed) == (0, 3, 4)
    with pytest.raises(ValueError, match="at least one epoch"):
        pruned_config(tmp_path, tmp_path / "out", method, 0)


@pytest.mark.parametrize("criterion", [IPAD(omega=0.5), TaylorWeight()], ids=lambda c: type(c).__name__)
def test_one_shot_by_any_criterion(criterion):
    net = build()
    record = one_shot(net, EXAMPLE, RULES, criterion, TRAINING.batches, loss)
    assert trace(net, EXAMPLE).cost("macs") <= 0.5 * trace(build(), EXAMPLE).cost("macs")
    again = record.apply_(build())
    again.load_state_dict(net.state_dict())


def test_one_shot_without_what_its_criterion_needs():
    net = build()
    with pytest.raises(ValueError, match="pass loss="):
        one_shot(net, EXAMPLE, RULES, TaylorWeight(), TRAINING.batches)
    assert net[0].out_channels == 8
