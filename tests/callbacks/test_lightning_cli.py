"""Tests that LightningCLI (jsonargparse) builds every public callback from YAML, and that a short fit prunes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    BestOfLast,
    BudgetCheckpoint,
    BudgetEarlyStopping,
    Cubic,
    FilterPruningCallback,
    FinalPhase,
    Limits,
    NetAdaptCallback,
    PruningPolicy,
    SlimmingCallback,
)
from lightning_prune.criteria import IPAD, LAMP, CostAware, Normalised, Propagated, TaylorGate


class Classifier(L.LightningModule):
    """A small convolutional classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 1, 8, 8)
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Batches(L.LightningDataModule):
    """Sixteen random images for training and validation."""

    def train_dataloader(self) -> DataLoader[Any]:
        images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) > 0).long()), batch_size=4)

    val_dataloader = train_dataloader


pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture(autouse=True)
def _clear_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])


def spec(name: str, **arguments: Any) -> dict[str, Any]:
    """Return the YAML node of an object of the package."""
    return {"class_path": f"lightning_prune.{name}", "init_args": arguments}


def build_cli(folder: Path, callbacks: list[dict[str, Any]], *command: str) -> LightningCLI:
    trainer = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        "callbacks": callbacks,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 0, "trainer": trainer}))
    return LightningCLI(
        Classifier,
        Batches,
        run=bool(command),
        save_config_callback=None,
        args=[*command, "--config", str(path)],
    )


def callback_of(cli: LightningCLI, kind: type) -> Any:
    (callback,) = (entry for entry in cli.trainer.callbacks if type(entry) is kind)  # type: ignore[attr-defined]
    return callback


def test_a_short_fit_from_yaml_prunes_to_the_budget(tmp_path: Path) -> None:
    pruning = spec(
        "FilterPruningCallback",
        budget={"macs": 0.6},
        amount={"macs": 0.5},
        criterion={"class_path": "lightning_prune.criteria.LAMP", "init_args": {"reduction": "sum"}},
        limits={"class_path": "lightning_prune.Limits", "init_args": {"layers": 0.9}},
        optimizer="carry",
        verbose=False,
    )
    cli = build_cli(tmp_path, [pruning], "fit")
    callback = callback_of(cli, FilterPruningCallback)
    assert callback.criterion == LAMP(reduction="sum")
    assert callback.policy.limits == Limits(0.9)
    assert len(callback.history) >= 1
    assert callback.history[-1].share["macs"] <= 0.6
    assert cli.model.net[0].out_channels < 8


def test_a_whole_policy_and_nested_criteria_are_built_from_yaml(tmp_path: Path) -> None:
    policy = spec("PruningPolicy", budget={"params": 0.5}, channel_multiple=2, exclude=["net.0"])
    criterion = spec("criteria.CostAware", gamma=0.5)
    criterion["init_args"]["criterion"] = spec("criteria.Propagated", weight=0.3)
    criterion["init_args"]["criterion"]["init_args"]["criterion"] = spec(
        "criteria.Normalised", criterion=spec("criteria.TaylorGate"), by="group"
    )
    pruning = spec(
        "FilterPruningCallback",
        budget=policy,
        criterion=criterion,
        schedule=spec("Cubic", cuts=3),
        final_phase=spec("FinalPhase", epochs=2),
    )
    callback = callback_of(build_cli(tmp_path, [pruning]), FilterPruningCallback)
    assert isinstance(callback.policy, PruningPolicy)
    assert (callback.policy.budget, callback.policy.channel_multiple) == ({"params": 0.5}, 2)
    assert list(callback.policy.exclude) == ["net.0"]
    assert callback.criterion == CostAware(Propagated(Normalised(TaylorGate(), "group"), 0.3), 0.5)
    assert callback.timing.schedule == Cubic(3)
    assert isinstance(callback.retraining.final_phase, FinalPhase)


def test_the_other_callbacks_are_built_from_yaml(tmp_path: Path) -> None:
    slimming = spec("SlimmingCallback", budget={"macs": 0.5}, rho=0.01, norms=["net.1"], verbose=False)
    netadapt = spec(
        "NetAdaptCallback",
        budget={"macs": 0.5},
        rounds=spec("netadapt.Rounds", rounds=3, steps=2),
        workers=spec("netadapt.Workers", n_jobs=1),
        criterion=spec("criteria.IPAD", omega=1.0),
        held_out=0.25,
        metric="val/loss",
    )
    others = [
        spec("BudgetCheckpoint", monitor="val/loss", dirpath=str(tmp_path)),
        spec("BudgetEarlyStopping", monitor="val/loss"),
        spec("BestOfLast", path=str(tmp_path / "best.ckpt"), k=2, monitor="val/loss"),
    ]
    callback = callback_of(build_cli(tmp_path, [slimming]), SlimmingCallback)
    assert (callback.method.rho, list(callback.policy.norms)) == (0.01, ["net.1"])
    callback = callback_of(build_cli(tmp_path, [netadapt]), NetAdaptCallback)
    assert (callback.method.rounds.rounds, callback.method.rounds.steps) == (3, 2)
    assert callback.criterion == IPAD(omega=1.0)
    for callback_spec, kind in zip(others, (BudgetCheckpoint, BudgetEarlyStopping, BestOfLast), strict=True):
        assert type(callback_of(build_cli(tmp_path, [callback_spec]), kind)) is kind
