"""Rounds in a Trainer for LightningModules, loaders and callbacks of every kind."""

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
    given = {"epochs": 2, **kwargs}
    val, path = given.pop("val", None), given.pop("path", None)
    run = trainer(callback, *more, **given)
    run.fit(module, data() if loader is None else loader, val, ckpt_path=path)
    return run


class Asks(Judged):
    """Logs and computes by what it knows of the training."""

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


def test_candidates_know_how_far_training_has_come(tmp_path):
    callback = rounds(tmp_path, metric="val/epoch")
    fitted(Asks(), callback)
    assert [each.after for each in callback.rounds_done] == [1.0] * 3
    callback = rounds(tmp_path, metric="val/steps")
    fitted(Asks(), callback)
    assert callback.rounds_done[0].before == 8.0  # 51 of 64 samples are 4 batches, in 2 epochs


class Rates(Judged):
    def training_step(self, batch: Any, index: int) -> Tensor:
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, index)


class Locked(Judged):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (Rates, {}, "have no trainer.strategy. Leave that out of training_step"),
        (Locked, {}, "cannot pickle '_thread.lock' object. Leave that out"),
        (Judged, {"metric": "val/miou"}, "validation logs no 'val/miou', but val/loss: set metric"),
        (Tupled, {}, "validation logs no 'val/loss', but nothing"),
    ],
)
def test_what_candidates_cannot_do_is_told_before_anything_is_trained(tmp_path, kind, change, message):
    torch.manual_seed(0)
    module = kind()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        fitted(module, rounds(tmp_path, **change))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class Keeps(Judged):
    """Keeps a loss with its graph, a lambda, and returns dictionaries, or nothing; its step takes no index."""

    def __init__(self) -> None:
        super().__init__()
        self.double = lambda x: 2 * x

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        self.last = self.double(super().training_step(batch, 0))
        return {"loss": self.last} if len(batch[0]) == 16 else None


def test_a_module_that_keeps_tensors_and_returns_dictionaries_or_nothing(tmp_path):
    module = Keeps()
    fitted(module, rounds(tmp_path))
    assert half(module)


class Measures(Judged):
    """Logs a metric object, by two loaders."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = Accuracy("multiclass", num_classes=4)

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self.accuracy.update(self(batch[0]), batch[1])
        self.log("val/accuracy", self.accuracy)
        self.log("val/number", torch.tensor(float(dataloader_idx)))


def test_several_loaders_of_validation_data(tmp_path):
    callback = rounds(tmp_path, held_out="val", metric="val/number/dataloader_idx_1")
    fitted(Measures(), callback, val=[OTHERS, OTHERS])
    assert [each.after for each in callback.rounds_done] == [1.0] * 3
    callback = rounds(tmp_path, held_out="val", metric="val/accuracy")
    run = fitted(Measures(), callback, val=data(number=64, shuffle=False), limit_val_batches=2)
    assert len(callback.method._training(run, []).evaluate.batches) == 2
    assert 0 < callback.rounds_done[0].after <= 1


def test_held_out_validation_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="held_out='val' needs validation data, and there is none"):
        fitted(Judged(), rounds(tmp_path, held_out="val"))


class Halves(Judged):
    def training_step(self, batch: Any, index: int) -> Tensor:
        left, right = batch["left"], batch["right"]
        return super().training_step([torch.cat([a, b]) for a, b in zip(left, right, strict=True)], index)


def test_several_loaders_of_training_data(tmp_path):
    module = Halves()
    loaders = {"left": data(number=32), "right": data(number=48)}
    fitted(module, rounds(tmp_path, held_out=OTHERS, recalibrate_batches=2), loader=loaders)
    assert half(module)
    with pytest.raises(ValueError, match="hold them out yourself and pass held_out=loader"):
        fitted(Halves(), rounds(tmp_path), loader=loaders)


class Stream(IterableDataset):
    """Samples one after the other, of which nobody knows how many there are."""

    def __iter__(self) -> Iterator[Any]:
        return iter(data().dataset)


def test_a_stream_of_training_data(tmp_path):
    module = Judged()
    fitted(module, rounds(tmp_path, held_out=OTHERS), loader=DataLoader(Stream(), 16))
    assert half(module)


class Augments(Judged):
    """Its own hooks change batches on their way."""

    def on_before_batch_transfer(self, batch: Any, index: int) -> Any:
        return [batch[0] - 100, batch[1]]

    def on_after_batch_transfer(self, batch: Any, index: int) -> Any:
        return [batch[0] * (-1 if self.trainer.training and self.training else 1), batch[1]]

    def training_step(self, batch: Any, index: int) -> Tensor:
        assert batch[0].mean() > 90  # of candidates, too
        return super().training_step(batch, index)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/mean", batch[0].mean())


def test_batches_pass_the_module_s_hooks_as_in_training_and_validation(tmp_path):
    callback = rounds(tmp_path, metric="val/mean", held_out=OTHERS)
    module = Augments()
    fitted(module, callback)
    mean = float(OTHERS.dataset.tensors[0].mean()) - 100
    assert callback.rounds_done[0].before == pytest.approx(mean, abs=1e-3)


def test_rounds_that_would_never_come_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="at the end of epoch 5, counted from 0, but training ends after 2 epochs"
    ):
        fitted(Judged(), rounds(tmp_path, start_epoch=5))


def test_a_dense_network_that_was_trained_past_the_start_is_pruned_at_the_next_chance(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="dense")
    fitted(Judged(), keep, epochs=3, enable_checkpointing=True)
    module, callback = Judged(), rounds(tmp_path, start_epoch=1)
    fitted(module, callback, epochs=5, path=tmp_path / "dense.ckpt")
    assert [cut.epoch for cut in callback.history] == [3]
    assert half(module)


class Clips(Judged):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, *args, **kwargs)


@pytest.mark.parametrize("kind", [Judged, Clips])
def test_gradients_of_candidates_are_clipped_as_those_of_the_training(tmp_path, kind):
    norms = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            training = callback.method._training(trainer, [batch], 1)
            optimizer = training.optimizer(pl_module.net)
            training.loss(pl_module.net, batch).backward()
            training.before_step(pl_module.net, optimizer)
            norms.append(sum(float(p.grad.square().sum()) for p in pl_module.net.parameters()) ** 0.5)
            pl_module.zero_grad()

    callback = rounds(tmp_path)
    fitted(kind(), callback, Look(), gradient_clip_val=1e-3, limit_train_batches=1)
    assert norms == pytest.approx([1e-3] * 2, rel=1e-2)


def test_averages_accumulation_half_precision_schedules_and_budget_checkpoints_beside_it(tmp_path):
    def run(folder: str, *more: L.Callback, path: Any = None) -> tuple[Any, Any, Any, L.Trainer]:
        torch.manual_seed(0)
        module, callback, average = Judged(), rounds(tmp_path / folder), EMAWeightAveraging(decay=0.9)
        module.decay_every = 1
        told = {
            "precision": "bf16-mixed",
            "accumulate_grad_batches": 2,
            "enable_checkpointing": True,
            "default_root_dir": tmp_path / folder,
            "epochs": 4,
        }
        done = fitted(module, callback, average, *more, path=path, val=OTHERS, **told)
        return module, callback, average, done

    best = BudgetCheckpoint(dirpath=tmp_path / "best", monitor="val/loss", filename="{epoch}")
    every = ModelCheckpoint(tmp_path / "all", filename="{epoch}", save_top_k=-1)
    module, callback, _, done = run("a", best, every)
    assert half(module)  # which holds the average now
    assert best.best_model_path.endswith(("epoch=2.ckpt", "epoch=3.ckpt"))
    assert done.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.1**4)
    # 4 batches are 2 steps; and those of the winners
    assert {float(s["step"]) for s in done.optimizers[0].state.values()} == {2.0 * 4 + 2 * 3}
    again, resumed, _, _ = run("a2", path=tmp_path / "all" / "epoch=1.ckpt")
    assert same(module, again)
    assert [vars(a) | {"seconds": 0} for a in resumed.rounds_done] == [
        vars(b) | {"seconds": 0} for b in callback.rounds_done
    ]


def test_the_next_fit_without_it_trains_on_all_samples(tmp_path):
    module = Judged()
    run = fitted(module, rounds(tmp_path))
    assert len(module.seen) == 51
    run.callbacks = [each for each in run.callbacks if not hasattr(each, "rounds_done")]
    run.fit_loop.max_epochs = 3
    run.fit(module, data())
    assert len(module.seen) == 64
    assert trace(module.net, EXAMPLE).cost("macs") > 0


def test_what_is_logged_is_reduced_as_told():
    logged = LoggedValues()
    for value, size in ((1.0, 4), (4.0, 2)):
        logged.size = size
        logged("mean", value)
        logged("sum", value, reduce_fx="sum")
        logged("most", torch.tensor(value), reduce_fx=torch.max)
    assert [logged.value(name) for name in ("mean", "sum", "most")] == [2.0, 5.0, 4.0]
