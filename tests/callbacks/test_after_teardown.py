"""Tests that checkpoints which are written after training, or after an exception, hold what was gathered so far."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from benchmarks.robustness.kill_run import BATCHES, Classifier, fit, pruning, same, shuffled, slimming
from tests.callbacks.test_resizing import pruner, silent

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|not met|limits may stop|LeafSpec)"),
    pytest.mark.filterwarnings(
        "ignore:.*(resuming from a checkpoint|callbacks used to create|ckpt_path=None)"
    ),
    pytest.mark.filterwarnings("ignore:.*(without a model|exists and is not empty|no last checkpoint)"),
]
EPOCHS = 5


class Planted(RuntimeError):
    pass


class Fail(Callback):
    """Raises once, at one step, in the hook that it is given."""

    def __init__(self, step: int, hook: str) -> None:
        self.step, self.failed = step, False
        setattr(self, hook, self._raise)

    def _raise(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step and not self.failed:
            self.failed = True
            raise Planted


class Failing(Classifier):
    """Raises after the forward of one step: statistics have seen the batch, and dropout has drawn numbers."""

    step = -1

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        if self.global_step == self.step:
            raise Planted
        return loss


def whole(make: Callable[[], Any]) -> dict[str, Any]:
    return fit(Classifier(), shuffled(), [make()], None, max_epochs=EPOCHS)


def resumed(make: Callable[[], Any], path: Path) -> dict[str, Any]:
    return fit(Classifier(), shuffled(), [make()], path, max_epochs=EPOCHS)


def failed(make: Callable[[], Any], module: Classifier, *callbacks: Callback) -> None:
    with pytest.raises(Planted):
        fit(module, shuffled(), [make(), *callbacks], None, max_epochs=EPOCHS)


def by_steps() -> Any:
    return pruning(every_n_steps=2 * BATCHES + 1, amount={"macs": 0.2})


KINDS = {"filters": pruning, "steps": by_steps, "slimming": slimming}
WRITERS = {
    "OnExceptionCheckpoint": lambda folder: OnExceptionCheckpoint(folder),
    "save_on_exception": lambda folder: ModelCheckpoint(folder, every_n_epochs=100, save_on_exception=True),
}


@pytest.mark.parametrize("writer", list(WRITERS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_checkpoint_of_an_exception_resumes_to_the_same_bits(
    tmp_path: Path, kind: str, writer: str
) -> None:
    make, fail = KINDS[kind], Fail(BATCHES + 3, "on_train_batch_start")
    failed(make, Classifier(), fail, WRITERS[writer](tmp_path))
    (path,) = tmp_path.glob("*.ckpt")
    assert same(resumed(make, path), whole(make))


def test_an_exception_right_after_a_cut_by_steps_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """The norms are estimated anew after the cut, on batches that draw random numbers."""

    def make() -> Any:
        return pruning(every_n_steps=BATCHES + 1, compensate=False, recalibrate_batches=2)

    fail = Fail(BATCHES + 1, "on_train_batch_start")
    failed(make, Classifier(), fail, OnExceptionCheckpoint(tmp_path))
    (path,) = tmp_path.glob("*.ckpt")
    expected = whole(make)
    assert expected["cuts"][0][0] == 1
    assert same(resumed(make, path), expected)


@pytest.mark.parametrize("hook", ["on_before_zero_grad", "on_train_batch_end", "on_validation_epoch_end"])
def test_an_exception_in_any_hook_resumes_to_the_same_cuts(tmp_path: Path, hook: str) -> None:
    failed(pruning, Classifier(), Fail(2 * BATCHES, hook), OnExceptionCheckpoint(tmp_path))
    (path,) = tmp_path.glob("*.ckpt")
    again, straight = resumed(pruning, path), whole(pruning)
    assert len(again["cuts"]) == len(straight["cuts"])


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_was_observed_of_a_batch_that_failed_is_dropped(tmp_path: Path, kind: str) -> None:
    module = Failing()
    module.step = BATCHES + 2
    every = ModelCheckpoint(tmp_path, filename="batch", every_n_train_steps=1)
    failed(KINDS[kind], module, every, OnExceptionCheckpoint(tmp_path))
    batch, failure = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("batch", "on_exception")
    )
    assert batch["global_step"] == failure["global_step"] == BATCHES + 2
    assert same(batch["lightning_prune"]["runs"], failure["lightning_prune"]["runs"])
    state = f"{'Slimming' if kind == 'slimming' else 'FilterPruning'}Callback"
    assert same(batch["callbacks"][state], failure["callbacks"][state])


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_checkpoint_that_the_user_writes_after_an_exception_or_after_training(
    tmp_path: Path, kind: str
) -> None:
    make = KINDS[kind]
    L.seed_everything(0, verbose=False)
    trainer = silent(make(), Fail(BATCHES + 3, "on_train_batch_start"), max_epochs=EPOCHS)
    module = Classifier()
    for layer in module.net:
        getattr(layer, "reset_parameters", bool)()
    with pytest.raises(Planted):
        trainer.fit(module, *shuffled())
    trainer.save_checkpoint(tmp_path / "exception.ckpt")
    saved = torch.load(tmp_path / "exception.ckpt", weights_only=True)["lightning_prune"]
    if kind != "slimming":
        assert saved["runs"][0]["statistics"] is not None
    assert pruner(trainer)._session is None


def test_a_checkpoint_after_training_holds_statistics_of_an_interval_that_goes_on(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="in", every_n_train_steps=3 * BATCHES)
    L.seed_everything(0, verbose=False)
    trainer = silent(by_steps(), keep, max_steps=3 * BATCHES)
    trainer.fit(Classifier(), *shuffled())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    within, after = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["lightning_prune"]["runs"]
        for name in ("in", "after")
    )
    assert within[0]["statistics"] is not None
    assert same(within, after)


def test_hooks_are_gone_after_an_exception() -> None:
    module = Classifier()
    failed(pruning, module, Fail(BATCHES + 3, "on_train_batch_start"))
    assert not any(part._forward_hooks for part in module.modules())
    assert "on_load_checkpoint" not in vars(module)
