"""Tests of NetAdaptCallback with LightningModules, loaders and callbacks of every kind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Accuracy

from lightning_prune import trace
from lightning_prune.callbacks.candidate_trainer import LoggedValues
from lightning_prune.callbacks.checkpoints import BudgetCheckpoint
from tests.callbacks.test_netadapt import EXAMPLE, Judged, half, rounds, same
from tests.callbacks.test_pruning import Tupled, data, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*returned `None`.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
]
OTHERS = data(number=16, shuffle=False)


def fitted(
    module: Any, callback: L.Callback, *more: L.Callback, loader: Any = None, **kwargs: Any
) -> L.Trainer:
    options = {"epochs": 2, **kwargs}
    val, path = options.pop("val", None), options.pop("path", None)
    lightning_trainer = trainer(callback, *more, **options)
    lightning_trainer.fit(module, data() if loader is None else loader, val, ckpt_path=path)
    return lightning_trainer


class ReadsTrainer(Judged):
    """Reads the progress of the trainer and logs it."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        assert self.trainer.max_epochs == 2
        assert self.trainer.training
        self.logger.experiment.add_image("first", batch[0][0]) if self.logger else None
        self.log_dict({"epoch": float(self.current_epoch)})
        return super().training_step(batch, index)

    def validation_step(self, batch: Any, index: int) -> None:
        assert self.trainer.validating
        assert not self.trainer.sanity_checking
        self.log("val/epoch", float(self.current_epoch))
        self.log("val/steps", float(self.global_step))


def test_candidates_can_read_the_progress_of_training(tmp_path):
    callback = rounds(tmp_path, metric="val/epoch")
    fitted(ReadsTrainer(), callback)
    assert [each.after for each in callback.rounds_done] == [1.0] * 3
    callback = rounds(tmp_path, metric="val/steps")
    fitted(ReadsTrainer(), callback)
    assert callback.rounds_done[0].before == 8.0  # 51 of 64 samples are 4 batches, in 2 epochs


class ReadsOptimizers(Judged):
    def training_step(self, batch: Any, index: int) -> Tensor:
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, index)


class HoldsLock(Judged):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ReadsOptimizers, {}, "have no trainer.strategy. Leave that out of training_step"),
        (HoldsLock, {}, "cannot pickle '_thread.lock' object. Leave that out"),
        (Judged, {"metric": "val/miou"}, "validation logs no 'val/miou', but val/loss: set metric"),
        (Tupled, {}, "validation logs no 'val/loss', but nothing"),
    ],
)
def test_modules_whose_candidates_cannot_be_trained_are_refused_before_training(
    tmp_path, kind, change, message
):
    torch.manual_seed(0)
    module = kind()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        fitted(module, rounds(tmp_path, **change))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class KeepsTensors(Judged):
    """Stores a loss with its graph and a lambda; its step has no index and returns a dictionary or None."""

    def __init__(self) -> None:
        super().__init__()
        self.double = lambda x: 2 * x

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        self.last = self.double(super().training_step(batch, 0))
        return {"loss": self.last} if len(batch[0]) == 16 else None


def test_a_module_that_stores_tensors_and_returns_dictionaries_or_none(tmp_path):
    module = KeepsTensors()
    fitted(module, rounds(tmp_path))
    assert half(module)


class LogsMetricObject(Judged):
    """Logs a metric object, with several loaders."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = Accuracy("multiclass", num_classes=4)

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self.accuracy.update(self(batch[0]), batch[1])
        self.log("val/accuracy", self.accuracy)
        self.log("val/number", torch.tensor(float(dataloader_idx)))


def test_several_loaders_of_validation_data(tmp_path):
    callback = rounds(tmp_path, held_out="val", metric="val/number/dataloader_idx_1")
    fitted(LogsMetricObject(), callback, val=[OTHERS, OTHERS])
    assert [each.after for each in callback.rounds_done] == [1.0] * 3
    callback = rounds(tmp_path, held_out="val", metric="val/accuracy")
    lightning_trainer = fitted(
        LogsMetricObject(), callback, val=data(number=64, shuffle=False), limit_val_batches=2
    )
    assert len(callback.method._held_out_batches(lightning_trainer)) == 2
    assert 0 < callback.rounds_done[0].after <= 1


def test_missing_validation_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="held_out='val' needs validation data, and there is none"):
        fitted(Judged(), rounds(tmp_path, held_out="val"))


class TwoLoaders(Judged):
    def training_step(self, batch: Any, index: int) -> Tensor:
        left, right = batch["left"], batch["right"]
        return super().training_step([torch.cat([a, b]) for a, b in zip(left, right, strict=True)], index)


def test_several_loaders_of_training_data(tmp_path):
    module = TwoLoaders()
    loaders = {"left": data(number=32), "right": data(number=48)}
    fitted(module, rounds(tmp_path, held_out=OTHERS, recalibrate_batches=2), loader=loaders)
    assert half(module)
    with pytest.raises(ValueError, match="hold them out yourself and pass held_out=loader"):
        fitted(TwoLoaders(), rounds(tmp_path), loader=loaders)


class Stream(IterableDataset):
    """A stream of samples of unknown length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(data().dataset)


def test_a_stream_of_training_data(tmp_path):
    module = Judged()
    fitted(module, rounds(tmp_path, held_out=OTHERS), loader=DataLoader(Stream(), 16))
    assert half(module)


class TransferHooks(Judged):
    """Changes batches in its transfer hooks."""

    def on_before_batch_transfer(self, batch: Any, index: int) -> Any:
        return [batch[0] - 100, batch[1]]

    def on_after_batch_transfer(self, batch: Any, index: int) -> Any:
        return [batch[0] * (-1 if self.trainer.training and self.training else 1), batch[1]]

    def training_step(self, batch: Any, index: int) -> Tensor:
        assert batch[0].mean() > 90  # also when candidates are trained
        return super().training_step(batch, index)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/mean", batch[0].mean())


def test_batches_of_candidates_pass_the_transfer_hooks_of_the_module(tmp_path):
    callback = rounds(tmp_path, metric="val/mean", held_out=OTHERS)
    module = TransferHooks()
    fitted(module, callback)
    mean = float(OTHERS.dataset.tensors[0].mean()) - 100
    assert callback.rounds_done[0].before == pytest.approx(mean, abs=1e-3)


def test_a_start_after_the_end_of_training_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="at the end of epoch 5, counted from 0, but training ends after 2 epochs"
    ):
        fitted(Judged(), rounds(tmp_path, start_epoch=5))


def test_a_dense_network_that_was_trained_past_start_epoch_is_pruned_after_the_next_epoch(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="dense")
    fitted(Judged(), keep, epochs=3, enable_checkpointing=True)
    module, callback = Judged(), rounds(tmp_path, start_epoch=1)
    fitted(module, callback, epochs=5, path=tmp_path / "dense.ckpt")
    assert [cut.epoch for cut in callback.history] == [3]
    assert half(module)


class ClipsItself(Judged):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, *args, **kwargs)


@pytest.mark.parametrize("kind", [Judged, ClipsItself])
def test_gradients_of_candidates_are_clipped_as_in_training(tmp_path, kind):
    norms = []

    class GradientNorm(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            training = callback.method._rehearsal(trainer, batch)
            optimizer = training.optimizer(pl_module.net)
            training.loss(pl_module.net, batch).backward()
            training.before_step(pl_module.net, optimizer)
            norms.append(sum(float(p.grad.square().sum()) for p in pl_module.net.parameters()) ** 0.5)
            pl_module.zero_grad()

    callback = rounds(tmp_path)
    fitted(kind(), callback, GradientNorm(), gradient_clip_val=1e-3, limit_train_batches=1)
    assert norms == pytest.approx([1e-3] * 2, rel=1e-2)


def test_the_search_works_with_averages_accumulation_half_precision_and_budget_checkpoints(tmp_path):
    def train(folder: str, *more: L.Callback, path: Any = None) -> tuple[Any, Any, Any, L.Trainer]:
        torch.manual_seed(0)
        module, callback, average = Judged(), rounds(tmp_path / folder), EMAWeightAveraging(decay=0.9)
        module.decay_every = 1
        options = {
            "precision": "bf16-mixed",
            "accumulate_grad_batches": 2,
            "enable_checkpointing": True,
            "default_root_dir": tmp_path / folder,
            "epochs": 4,
        }
        lightning_trainer = fitted(module, callback, average, *more, path=path, val=OTHERS, **options)
        return module, callback, average, lightning_trainer

    best = BudgetCheckpoint(dirpath=tmp_path / "best", monitor="val/loss", filename="{epoch}")
    every = ModelCheckpoint(tmp_path / "all", filename="{epoch}", save_top_k=-1)
    module, callback, _, lightning_trainer = train("a", best, every)
    assert half(module)  # it has the averaged weights now
    assert best.best_model_path.endswith(("epoch=2.ckpt", "epoch=3.ckpt"))
    assert lightning_trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.1**4)
    # 4 batches are 2 steps; the steps of the winners are added
    assert {float(s["step"]) for s in lightning_trainer.optimizers[0].state.values()} == {2.0 * 4 + 2 * 3}
    resumed, resumed_callback, _, _ = train("a2", path=tmp_path / "all" / "epoch=1.ckpt")
    assert same(module, resumed)
    assert [vars(a) | {"seconds": 0} for a in resumed_callback.rounds_done] == [
        vars(b) | {"seconds": 0} for b in callback.rounds_done
    ]


def test_the_next_fit_without_the_callback_trains_on_all_samples(tmp_path):
    module = Judged()
    lightning_trainer = fitted(module, rounds(tmp_path))
    assert len(module.trained_on) == 51
    lightning_trainer.callbacks = [
        callback for callback in lightning_trainer.callbacks if not hasattr(callback, "rounds_done")
    ]
    lightning_trainer.fit_loop.max_epochs = 3
    lightning_trainer.fit(module, data())
    assert len(module.trained_on) == 64
    assert trace(module.net, EXAMPLE).cost("macs") > 0


def test_logged_values_are_reduced_by_their_reduce_fx():
    logged = LoggedValues()
    for value, size in ((1.0, 4), (4.0, 2)):
        logged.size = size
        logged("mean", value)
        logged("sum", value, reduce_fx="sum")
        logged("most", torch.tensor(value), reduce_fx=torch.max)
    assert [logged.value(name) for name in ("mean", "sum", "most")] == [2.0, 5.0, 4.0]
