"""Tests of the experiments with IPAD's protocol: a small version is run, the full one is composed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_prune.cli.config import conf_dir
from lightning_prune.cli.train import run
from tests.support.students import QUIET

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Checkpoint directory")]
SMALL = [
    "data.size=16",
    "data.slices_per_axis=9",
    "data.batch_size=8",
    "net.width=8",
    "latency_runs=0",
    "logger=none",
]
EARLY_CUTS = [
    "prune.start_epoch=1",
    "prune.every_n_epochs=2",
    "prune.amount.macs=0.3",
    "callbacks.stopping.patience=1",
]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.fixture(autouse=True)
def _output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hydra = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(tmp_path)}}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", hydra)


@pytest.mark.parametrize("experiment", ["ipad_ritnet", "ipad_unet"])
def test_cuts_alternate_with_training_until_26_percent_of_the_macs_remain(experiment, tmp_path):
    config = composed(f"experiment={experiment}", *SMALL, *EARLY_CUTS, "trainer.max_epochs=30", "table=false")
    summary = run(config, tmp_path)
    assert [cut["epoch"] for cut in summary.cuts] == [1, 3, 5]  # two epochs between cuts
    assert summary.final.macs <= 0.26 * summary.dense.macs
    assert 6 < summary.epochs < 30  # trained after the last cut, and stopped early
    weights = [row["loss/weight_surface"] for row in summary.curves]
    assert weights == [pytest.approx(epoch / 30) for epoch in range(summary.epochs)]
    assert list((tmp_path / "checkpoints").glob("best*"))
    assert (tmp_path / "report.png").is_file()


@pytest.mark.parametrize(("experiment", "step"), [("ipad_ritnet", 1.0e9), ("ipad_unet", 1.0e10)])
def test_full_experiments_have_the_settings_of_the_paper(experiment, step):
    """Networks, steps, budget, retraining, optimizer. A small one removes the same share of its own MACs per cut."""
    small, full = (
        composed(f"experiment={experiment}"),
        composed(f"experiment={experiment}_full", "data.root=x"),
    )
    dense = {"ipad_ritnet": 16_420_864_000, "ipad_unet": 155_926_528_000}[experiment]
    params = {"ipad_ritnet": 248_900, "ipad_unet": 17_266_436}[experiment]
    assert sum(p.numel() for p in instantiate(full.net).parameters()) == params
    assert full.task.height * full.task.width == 640 * 400
    assert full.prune.amount.macs == step
    assert small.prune.amount.macs == pytest.approx(step / dense, rel=1e-3)
    for config in small, full:
        assert (config.prune.budget.macs, config.prune.every_n_epochs) == (0.26, 5)
        assert (config.prune.optimizer, config.optimizer._target_.split(".")[-1]) == ("reset", "Adam")
        assert (config.optimizer.lr, config.prune.limits.layers) == (1e-3, 0.75)
        assert config.scheduler._target_.endswith("ReduceLROnPlateau")
