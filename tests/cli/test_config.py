"""Configurations of finished runs: also those that were made when classes had other names."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_prune import FilterPruningCallback, Limits
from lightning_prune.cli.config import (
    PREFIX,
    RENAMED_TARGETS,
    conf_dir,
    current_target,
    load_config,
    root_cause,
)
from lightning_prune.cli.prune import pruned_config
from lightning_prune.cli.run_groups import setting
from lightning_prune.criteria import IPAD
from lightning_prune.reporting.run_folder import Summary
from lightning_prune.segmentation import RITnet, SegmentationModule
from lightning_prune.trainer.checkpoint_io import AtomicCheckpointIO

CONF = Path(__file__).parents[2] / "conf"
FORMER_NAMES = {current: former for former, current in RENAMED_TARGETS.items()}
UNCHANGED = (
    "DepthSettings",
    "ResumableCSVLogger",
    "TrackioLogger",
    "classification.",
    "criteria.",
    "data.",
    "distillation.",
    "segmentation.SegmentationModule",
)


@pytest.fixture(autouse=True)
def _output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the output folder that Hydra sets in a run."""
    hydra = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path)}}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", hydra)


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def with_former_targets(node: Any) -> Any:
    """Return a configuration as it was saved before the classes moved."""
    if isinstance(node, dict):
        return {
            key: former(value) if key == "_target_" else with_former_targets(value)
            for key, value in node.items()
        }
    return [with_former_targets(value) for value in node] if isinstance(node, list) else node


def former(target: str) -> str:
    name = target.removeprefix(PREFIX)
    return PREFIX + FORMER_NAMES[name] if target.startswith(PREFIX) and name in FORMER_NAMES else target


def save_former(config: DictConfig, folder: Path) -> str:
    """Save a configuration with former names; return its text."""
    old = with_former_targets(OmegaConf.to_container(config, resolve=True))
    OmegaConf.save(OmegaConf.create(old), folder / "config.yaml")
    return (folder / "config.yaml").read_text()


@pytest.mark.parametrize("name", RENAMED_TARGETS)
def test_every_former_name_leads_to_an_object_and_is_gone_itself(name: str) -> None:
    target = current_target(PREFIX + name)
    assert target == PREFIX + RENAMED_TARGETS[name]
    assert isinstance(get_object(target), type)
    with pytest.raises((ImportError, AttributeError)):
        getattr(importlib.import_module(PREFIX + name.rpartition(".")[0]), name.rpartition(".")[2])


def test_every_target_of_the_package_in_conf_had_a_former_name_or_the_same() -> None:
    lines = [line for path in CONF.rglob("*.yaml") for line in path.read_text().splitlines()]
    targets = {line.split("_target_:")[1].split()[0] for line in lines if "_target_:" in line}
    names = {target.removeprefix(PREFIX) for target in targets if target.startswith(PREFIX)}
    assert len(names) > 30
    assert {name for name in names - FORMER_NAMES.keys() if not name.startswith(UNCHANGED)} == set()


@pytest.mark.parametrize("target", ["torch.optim.Adam", "my.limits.Limits", "lightning_prune.criteria.IPAD"])
def test_other_names_stay(target: str) -> None:
    assert current_target(target) == target


def test_a_configuration_with_former_names_instantiates(tmp_path: Path) -> None:
    config = composed(
        *("net=ritnet", "loss=ritnet", "prune/schedule=cubic", "trainer.accelerator=cpu"),
        *("logger=none", "checkpoint=none"),
    )
    text = save_former(config, tmp_path)
    for name in ("callback.FilterPruningCallback", "limits.Limits", "networks.RITnet", "losses.WeightedSum"):
        assert f"{PREFIX}{name}" in text
    loaded = load_config(tmp_path)
    assert loaded == OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    callback, module = (instantiate(loaded[key], _convert_="all") for key in ("prune", "module"))
    assert isinstance(callback, FilterPruningCallback)
    assert (type(callback.criterion), callback.policy.limits) == (IPAD, Limits())
    assert isinstance(module, SegmentationModule)
    assert isinstance(module.net, RITnet)
    assert isinstance(instantiate(loaded.trainer.plugins[0]), AtomicCheckpointIO)


@pytest.mark.parametrize("method", ["netadapt", "oneshot"])
def test_a_run_with_former_names_can_be_pruned(tmp_path: Path, method: str) -> None:
    text = save_former(composed("prune=none", "logger=none", "checkpoint=best", "net=ritnet"), tmp_path)
    assert "lightning_prune.best.BudgetCheckpoint" in text
    config = pruned_config(tmp_path, tmp_path / "out", method, 1)
    names = [callback._target_ for callback in config.callbacks.values()]
    assert "lightning_prune.BudgetCheckpoint" in names
    assert all(get_object(name) for name in names)
    assert isinstance(instantiate(config.net, _convert_="all"), torch.nn.Module)


def test_a_sweep_compares_runs_of_both_kinds_by_the_same_names(tmp_path: Path) -> None:
    save_former(composed("net=ritnet"), tmp_path)
    assert setting(tmp_path, Summary(), "net._target_") == "lightning_prune.segmentation.RITnet"


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("torch.optim.Adamm", "; did you mean torch.optim.Adam?"),
        ("lightning_prune.criteria.IPADD", "; did you mean lightning_prune.criteria.IPAD?"),
        ("torch.optim.Qqqq", ""),
    ],
)
def test_a_target_that_does_not_exist_is_answered_with_the_nearest(path: str, hint: str) -> None:
    importlib.import_module(path.rpartition(".")[0])
    with pytest.raises(InstantiationException) as raised:
        instantiate({"_target_": path})
    assert root_cause(raised.value).partition(path + "'")[2].endswith(hint)
    assert ("did you mean" in root_cause(raised.value)) == bool(hint)
