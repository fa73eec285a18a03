"""What goes wrong while training goes on: passing failures, state outside of optimizers, errors in users' hooks."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.optim import Lookahead
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterPruningCallback, NetAdaptCallback, OneShot, last_checkpoint
from lightning_prune.callbacks.methods.netadapt import NetAdapt
from lightning_prune.criteria import L2
from lightning_prune.netadapt import Rounds
from lightning_prune.serialization.carried_record import carried_record

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(GPU available|exists and is not empty|resuming from a checkpoint)"),
    pytest.mark.filterwarnings("ignore:budget .* not met"),
]


class Faults:
    """Number of forwards that are still to fail; an object of its own, since tracing restores numbers of modules."""

    def __init__(self, number: int = 0) -> None:
        self.number = number


class Net(L.LightningModule):
    def __init__(self, faults: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.faults = Faults(faults)
        convolutions = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
        self.net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.net[0].out_channels + self.net[2].out_channels < 16 and self.faults.number > 0:
            self.faults.number -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def loader() -> DataLoader:
    images = torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(16) % 2), 4)


def callback(**changes: Any) -> FilterPruningCallback:
    settings = {
        "amount": {"macs": 0.25},
        "start_epoch": 0,
        "compensate": False,
        "verbose": False,
        "criterion": L2(),
    }
    return FilterPruningCallback({"macs": 0.5}, **{**settings, **changes})


def fit(
    module: L.LightningModule, *callbacks: L.Callback, epochs: int = 4, resume: Path | None = None
) -> L.Trainer:
    saves = any(isinstance(each, ModelCheckpoint) for each in callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "max_epochs": epochs, "enable_checkpointing": saves, **quiet}
    trainer = L.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, loader(), ckpt_path=resume)
    return trainer


def test_the_only_cut_of_a_schedule_is_made_an_epoch_later_if_memory_lacks(tmp_path: Path) -> None:
    pruning = callback(amount=None, schedule=OneShot(), every_n_epochs=100, start_epoch=1)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="no cut this time"):
        fit(Net(faults=4), pruning, keep)
    assert [cut.epoch for cut in pruning.history] == [2]
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["lightning_prune"]["runs"][0]
    assert (saved["exhausted"], saved["owed"]) == (False, 1)
    again = callback(amount=None, schedule=OneShot(), every_n_epochs=100, start_epoch=1)
    fit(Net(), again, ModelCheckpoint(tmp_path), resume=tmp_path / "epoch=1.ckpt")
    assert [cut.epoch for cut in again.history] == [2]
    assert again.record == pruning.record


def test_a_cut_by_steps_is_tried_again_after_as_many_steps() -> None:
    pruning = callback(every_n_steps=3, start_epoch=1)
    with pytest.warns(UserWarning, match="no cut this time"):
        fit(Net(faults=4), pruning)
    assert [cut.step for cut in pruning.history] == [6, 9]


class SharedFaults(Faults):
    """Are those of all copies of a network."""

    def __deepcopy__(self, memo: Any) -> SharedFaults:
        return self


class Scored(Net):
    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader")
def test_a_search_whose_network_cannot_be_traced_for_now_changes_nothing_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, widths, search = Scored(), list[int](), NetAdapt._search

    def search_then_lack_memory(self: NetAdapt, trainer: Any, session: Any, network: Any, *more: Any) -> Any:
        module.faults.number = 0
        result = search(self, trainer, session, network, *more)
        module.faults.number = 0 if widths else 99
        widths.append(module.net[0].out_channels + module.net[2].out_channels)
        return result

    module.faults = SharedFaults()
    monkeypatch.setattr(NetAdapt, "_search", search_then_lack_memory)
    rounds = Rounds(rounds=1, decay=1.0, steps=1)
    pruning = NetAdaptCallback(
        {"macs": 0.6}, start_epoch=1, rounds=rounds, metric="val_loss", folder=tmp_path, verbose=False
    )
    with pytest.warns(UserWarning, match="no cut this time"):
        fit(module, pruning)
    assert widths == [16, 16]
    assert [cut.epoch for cut in pruning.history] == [2]
    assert pruning.record == carried_record(module)
    assert pruning.within_budget


class WithLookahead(Net):
    def configure_optimizers(self) -> Any:
        return Lookahead(torch.optim.SGD(self.parameters(), 0.01, momentum=0.9), k=2)


def test_lookahead_is_cut_along() -> None:
    """The slow weights and momentum of what remains stay: equal to those of a network that was small all along."""
    module, pruning = WithLookahead(), callback()
    trainer = fit(module, pruning)
    state = trainer.optimizers[0]._base_optimizer.state
    assert len(pruning.history) == 2
    for parameter in module.parameters():
        assert {value.shape for value in state[parameter].values()} == {parameter.shape}
        assert state[parameter].keys() == {"momentum_buffer", "lookahead_slow_buff"}


class Opaque(Net):
    """Its optimizer keeps the mean gradient of all parameters in one vector, and its rate falls."""

    def configure_optimizers(self) -> Any:
        class Flat(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                loss = super().step(closure)
                flat = torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]])
                self.mean = flat if not hasattr(self, "mean") else self.mean.lerp(flat, 0.1)
                return loss

        optimizer = Flat(self.parameters(), 0.01, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def test_an_optimizer_that_cannot_be_cut_is_built_anew_and_keeps_its_schedule() -> None:
    module, pruning = Opaque(), callback()
    with pytest.warns(UserWarning, match=r"Flat keeps tensors outside .*\(Flat.mean\): .*built anew"):
        trainer = fit(module, pruning)
    assert len(pruning.history) == 2
    optimizer = trainer.optimizers[0]
    assert optimizer.mean.numel() == sum(parameter.numel() for parameter in module.parameters())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 2**4)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4


class Raising(Net):
    fails = True

    def on_after_prune(self, record: Any) -> None:
        if self.fails:
            raise RuntimeError("in the user's hook")


def test_an_error_in_a_hook_right_after_a_cut_loses_nothing(tmp_path: Path) -> None:
    """The checkpoint that the exception leaves holds the cut, once, and a resumed run reaches the budget."""
    pruning, keep = callback(), ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(RuntimeError, match="in the user's hook"):
        fit(Raising(), pruning, keep)
    checkpoint = last_checkpoint(tmp_path)
    state = next(iter(torch.load(checkpoint, weights_only=True)["callbacks"].values()))
    module, again = Raising(), callback()
    module.fails = False
    fit(module, again, ModelCheckpoint(tmp_path), resume=checkpoint)
    assert [cut.epoch for cut in again.history] == [0, 1]
    assert again.within_budget, state


def test_a_module_can_be_pickled_and_copied_while_it_trains() -> None:
    class Pickling(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            copies.append(pickle.loads(pickle.dumps(pl_module)))

    copies: list[Any] = []
    module = Net()
    fit(module, callback(criterion=None), Pickling(), epochs=2)
    assert copies[-1].net[0].out_channels + copies[-1].net[2].out_channels < 16
    copies[-1].on_load_checkpoint({})
    assert all(
        torch.equal(value, copies[-1].state_dict()[key]) for key, value in copies[-1].state_dict().items()
    )
    assert copies[-1](torch.zeros(1, 1, 12, 12)).shape == (1, 2)


@pytest.mark.parametrize(
    "budget", [0.5, [0.5], {"macs": "0.5"}, "macs", {"macs": None}, {"macs": True}, {1: 0.5}]
)
def test_a_budget_that_is_no_mapping_of_numbers_is_named(budget: Any) -> None:
    with pytest.raises(ValueError, match=r"budget must say of which resource .*'macs': 0.5.*got"):
        FilterPruningCallback(budget)
