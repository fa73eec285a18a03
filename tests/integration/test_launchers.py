"""Tests that the main process follows a training in processes that a launcher has started."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.robustness.kill_run import Classifier, pruning, rounds, same, shuffled, slimming
from lightning_prune import BestOfLast, BudgetCheckpoint, load_pruned
from lightning_prune.callbacks.checkpoints import best_weights
from lightning_prune.serialization.carried_record import carried_record
from tests.callbacks.test_resizing import outputs, pruner

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|not met|limits may stop|LeafSpec|fork)"),
    pytest.mark.filterwarnings(
        "ignore:.*(exists and is not empty|in eval mode|DistributedSampler|sync_dist|multi-process)"
    ),
]


class Seeded(L.Callback):
    """Seeds Python's generator, which is seeded at random in a forked process, and from which images draw."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        random.seed(0)


def launched(strategy: str, devices: int, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        strategy=strategy,
        devices=devices,
        accelerator="cpu",
        logger=False,
        callbacks=[Seeded(), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, (ModelCheckpoint, BestOfLast)) for each in callbacks),
        **options,
    )


class Added(Classifier):
    """Brings its callback itself: the trainer of the main process does not know it."""

    def configure_callbacks(self) -> list[L.Callback]:
        return [pruning()]


@pytest.mark.parametrize("make", [pruning, slimming, rounds])
def test_module_and_callback_of_the_main_process_follow_a_forked_training(tmp_path: Path, make: Any) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callback, module = make(), Classifier()
    trainer = launched("ddp_fork", 1 if make is rounds else 2, callback, keep, max_epochs=5)
    trainer.fit(module, *shuffled())
    last = torch.load(tmp_path / "epoch=4.ckpt", weights_only=True)
    expected = load_pruned(Classifier(), tmp_path / "epoch=4.ckpt")
    assert same(dict(module.state_dict()), dict(expected.state_dict()))
    assert str(module) == str(expected)
    assert callback.record == carried_record(module)
    assert callback.record.to_dict() == last["lightning_prune"]["record"]
    assert callback.history
    assert callback.within_budget == last["lightning_prune"]["status"][0]
    assert same(callback.state_dict()["history"], last["callbacks"][callback.state_key]["history"])
    trainer.validate(module, shuffled()[1], ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    trainer.save_checkpoint(tmp_path / "main.ckpt")
    assert torch.equal(outputs(load_pruned(Classifier(), tmp_path / "main.ckpt")), outputs(module))


def test_a_callback_that_the_module_brings_is_followed_as_well() -> None:
    trainer, module = launched("ddp_fork", 1, max_epochs=4), Added()
    trainer.fit(module, *shuffled())
    assert carried_record(module)
    assert module.net[0].weight.shape[0] == module.net[0].out_channels < 12 or module.net[3].out_channels < 16


def test_best_models_are_known_in_the_main_process(tmp_path: Path) -> None:
    budget = BudgetCheckpoint("val_loss", dirpath=tmp_path / "budget")
    best = BestOfLast(tmp_path / "best.safetensors", k=2, monitor="val_loss")
    plain = ModelCheckpoint(tmp_path / "plain", every_n_epochs=1)
    for callbacks in ([plain, budget], [best]):
        trainer = launched("ddp_fork", 1, pruning(), *callbacks, max_epochs=8)
        trainer.fit(module := Classifier(), *shuffled())
        weights = best_weights(trainer)
        assert weights is not None
        assert {name: value.shape for name, value in weights.items()} == {
            name: value.shape for name, value in module.state_dict().items()
        }
    assert best.best_value is not None
    assert pruner(trainer).within_budget


@pytest.mark.slow
def test_main_process_follows_spawned_training(tmp_path: Path) -> None:
    program = tmp_path / "spawned.py"
    program.write_text(
        "from benchmarks.robustness.kill_run import Classifier, pruning, shuffled\n"
        "from tests.integration.test_launchers import launched\n"
        "if __name__ == '__main__':\n"
        "    module, callback = Classifier(), pruning()\n"
        "    launched('ddp_spawn', 2, callback, max_epochs=4).fit(module, *shuffled())\n"
        "    assert callback.record and callback.record.apply_(Classifier()).net[3].weight.shape == "
        "module.net[3].weight.shape\n"
    )
    subprocess.run([sys.executable, str(program)], check=True, cwd=Path(__file__).parents[2], timeout=600)
