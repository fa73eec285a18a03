"""Tests that checkpoints and early stopping consider only models within the budget, scored at their present size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.robustness.kill_run import Classifier, pruning, shuffled
from lightning_prune import load_pruned
from lightning_prune.callbacks.checkpoints import (
    BestOfLast,
    BudgetCheckpoint,
    BudgetEarlyStopping,
    best_weights,
)
from lightning_prune.selection.limits import Limits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|not met|limits may stop)"),
]


class Scored(Classifier):
    """Logs one of the scores in each epoch; in these tests the largest models have the best scores."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = scores

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("score", self.scores[self.current_epoch])
        self.log("val_loss", 1.0)


def fit(module: L.LightningModule, *callbacks: L.Callback, epochs: int = 8, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[pruning(**{"amount": {"macs": 0.3}, **options}), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, (ModelCheckpoint, BestOfLast)) for c in callbacks),
        num_sanity_val_steps=0,
    )
    trainer.fit(module, *shuffled())
    return trainer


def cuts(trainer: L.Trainer) -> list[int]:
    return [cut.epoch for cut in trainer.callbacks[0].history]


#: cuts come at the ends of epochs 1 and 2; the models of epochs 3 to 7 were validated as they are saved
SCORES = [9.0, 9.0, 9.0, 1.0, 3.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_the_best_checkpoint_is_within_the_budget_and_was_scored_after_its_last_cut(
    tmp_path: Path, at_epoch_end: bool
) -> None:
    keep = BudgetCheckpoint(
        "score", "max", dirpath=tmp_path, save_top_k=2, save_on_train_epoch_end=at_epoch_end
    )
    plain = ModelCheckpoint(tmp_path / "plain", monitor="score", mode="max")
    module = Scored(SCORES)
    trainer = fit(module, keep, plain)
    assert cuts(trainer) == [1, 2]
    assert "epoch=0" in plain.best_model_path
    assert "epoch=4" in keep.best_model_path
    assert sorted(path.name[:7] for path in tmp_path.glob("*.ckpt")) == ["epoch=4", "epoch=6"]
    loaded = load_pruned(Scored(SCORES), keep.best_model_path)
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in module.parameters()]
    assert best_weights(trainer).keys() == module.state_dict().keys()


def test_a_function_of_trainer_and_module_can_be_monitored(tmp_path: Path) -> None:
    epochs: list[int] = []

    def near_five(trainer: L.Trainer, module: L.LightningModule) -> float:
        epochs.append(trainer.current_epoch)
        return abs(trainer.current_epoch - 5)

    keep = BudgetCheckpoint(near_five, dirpath=tmp_path)
    fit(Scored(SCORES), keep)
    assert epochs == [3, 4, 5, 6, 7]
    assert "epoch=5" in keep.best_model_path
    assert keep.best_model_score == 0


def test_without_pruning_every_model_competes(tmp_path: Path) -> None:
    keep = BudgetCheckpoint("score", "max", dirpath=tmp_path)
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, callbacks=[keep], enable_progress_bar=False
    )
    trainer.fit(Scored(SCORES), *shuffled())
    assert "epoch=0" in keep.best_model_path


def test_a_budget_that_is_not_met_writes_nothing_and_warns(tmp_path: Path) -> None:
    keep, last = (
        BudgetCheckpoint("score", dirpath=tmp_path),
        BestOfLast(tmp_path / "it.safetensors", 3, "score"),
    )
    with pytest.warns(UserWarning, match="wrote nothing") as warned:
        trainer = fit(Scored(SCORES), keep, last, limits=Limits(0.45), epochs=4)
    text = " ".join(str(warning.message) for warning in warned)
    assert "BudgetCheckpoint wrote nothing" in text
    assert "BestOfLast wrote nothing" in text
    assert best_weights(trainer) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("k", "mode", "best"), [(2, "max", 6), (5, "max", 6), (2, "min", 7), (4, "min", 7)])
def test_the_best_of_the_last_models_is_written_at_the_end(
    tmp_path: Path, k: int, mode: str, best: int
) -> None:
    weights: dict[int, torch.Tensor] = {}
    path = tmp_path / "new" / "best.safetensors"

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            weights[trainer.current_epoch] = module.net[0].weight.detach().clone()
            assert not path.exists()

    keep = BestOfLast(path, k, "score", mode)
    trainer = fit(Scored(SCORES), Watch(), keep)
    assert keep.best_value == SCORES[best]
    assert torch.equal(load_pruned(Scored(SCORES), path).net[0].weight, weights[best])
    assert torch.equal(best_weights(trainer)["net.0.weight"], weights[best])


def test_wrong_arguments_of_best_of_last_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k must be at least 1"):
        BestOfLast(tmp_path, 0, "score")
    with pytest.raises(ValueError, match="mode must be 'min' or 'max'"):
        BestOfLast(tmp_path, 1, "score", "most")
    with pytest.raises(ValueError, match=r"no metric 'scores' was logged; there are .*score"):
        fit(Scored(SCORES), BestOfLast(tmp_path / "it.safetensors", 1, "scores"))


def test_early_stopping_waits_for_the_budget() -> None:
    scores = [9.0, 9.0, 9.0, 1.0, 2.0, 1.5, 1.5, 1.5]
    stop = BudgetEarlyStopping("score", mode="max", patience=2)
    trainer = fit(Scored(scores), stop)
    assert cuts(trainer) == [1, 2]
    assert (trainer.current_epoch, stop.stopped_epoch, stop.best_score) == (7, 6, 2.0)


def test_early_stopping_begins_when_the_limits_end_pruning() -> None:
    stop = BudgetEarlyStopping(lambda trainer, module: 1.0, patience=2)
    trainer = fit(Scored(SCORES), stop, limits=Limits(0.45))
    assert trainer.current_epoch < 8
    assert stop.monitor == "value"


def test_early_stopping_stops_at_once_if_the_value_is_not_finite() -> None:
    trainer = fit(Scored([1.0, float("nan"), *[1.0] * 6]), BudgetEarlyStopping("score"))
    assert trainer.current_epoch == 2
