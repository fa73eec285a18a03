"""Tests of training in which residual blocks vanish."""

from __future__ import annotations

import copy
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import (
    L2,
    DepthSettings,
    FilterPruningCallback,
    NetAdaptCallback,
    PruningPolicy,
    SlimmingCallback,
    load_pruned,
    save_pruned,
)
from lightning_prune.classification.networks.cifar_resnet import CifarResNet

EMA = partial(EMAWeightAveraging, decay=0.8)
SWA = partial(StochasticWeightAveraging, swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1)
DEPTH = DepthSettings(max_depth_ratio=0.7, images=16)


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = CifarResNet(depth=20, in_channels=3, width=4)
        self.example_input_array = torch.zeros(1, 3, 8, 8)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def test_step(self, batch, index: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(48, 3, 8, 8, generator=generator)
    labels = torch.randint(10, (48,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=16)


def callback(**options) -> FilterPruningCallback:
    options = {
        "budget": {"macs": 0.5},
        "amount": {"macs": 0.25},
        "criterion": L2(),
        "start_epoch": 0,
    } | options
    return FilterPruningCallback(**options, depth=DEPTH, compensate=False, verbose=False)


def trainer(path, epochs: int, *callbacks: L.Callback, **options) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), default_root_dir=path, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def test_blocks_vanish_in_training_and_a_resume_gives_the_same_bits(tmp_path):
    module, prune = Classifier(), callback()
    before = sum(p.numel() for p in module.parameters())
    trainer(tmp_path, 4, prune, enable_checkpointing=False).fit(module, data())
    assert prune.record is not None
    assert prune.record.vanished
    assert sum(p.numel() for p in module.parameters()) < before
    assert prune.history[-1].share["macs"] <= 0.5

    first = Classifier()
    run = trainer(tmp_path, 2, callback(), enable_checkpointing=False)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "middle.ckpt")
    second, again = Classifier(), callback()
    trainer(tmp_path, 4, again, enable_checkpointing=False).fit(
        second, data(), ckpt_path=tmp_path / "middle.ckpt"
    )
    assert first.losses + second.losses == module.losses
    assert again.record == prune.record
    for name, value in module.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("average", [EMA, SWA])
def test_blocks_vanish_from_an_average_too(tmp_path, average):
    module, prune, averaging, reference = (
        Classifier(),
        callback(start_epoch=1, recalibrate_batches=0),
        average(),
        Classifier(),
    )
    seen = _AroundCut(averaging)
    trainer(tmp_path, 3, seen.before, averaging, prune, seen.after, enable_checkpointing=False).fit(
        module, data()
    )
    assert prune.record is not None
    assert prune.record.vanished
    reference.load_state_dict(seen.before.net)  # the average before the cut, cut by hand, is the one after it
    seen.after.record.apply_(reference)
    assert reference.state_dict().keys() == seen.after.net.keys()
    for name, value in reference.state_dict().items():
        assert torch.equal(value, seen.after.net[name]), name


class _Keep(L.Callback):
    """Keeps the average at the end of the epoch of the first cut."""

    def __init__(self, averaging: L.Callback) -> None:
        self.averaging, self.net, self.record = averaging, {}, None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            model = self.averaging._average_model
            self.net = copy.deepcopy(getattr(model, "module", model).state_dict())
            prune = next(each for each in trainer.callbacks if isinstance(each, FilterPruningCallback))
            self.record = prune.record


class _AroundCut:
    """Keeps the average before and after the first cut, by the place among the callbacks."""

    def __init__(self, averaging: L.Callback) -> None:
        self.before, self.after = _Keep(averaging), _Keep(averaging)


def test_a_trained_module_takes_on_a_checkpoint_with_more_blocks(tmp_path):
    module, prune = Classifier(), callback()
    with pytest.warns(UserWarning, match="not met"):
        run = _fitted(tmp_path, module, prune)
    run.save_checkpoint(tmp_path / "early.ckpt")
    early = copy.deepcopy(module.net).eval()
    run = trainer(tmp_path, 3, prune, enable_checkpointing=False)
    run.fit(module, data(), ckpt_path=tmp_path / "early.ckpt")
    saved = tmp_path / "net.safetensors"
    save_pruned(module.net, prune.record and _of_net(prune), saved)
    fresh = load_pruned(Classifier().net, saved).eval()
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(fresh(images), module.net.eval()(images))
    run.test(module, data(), ckpt_path=tmp_path / "early.ckpt")
    assert torch.equal(module.net.eval()(images), early(images))


def _fitted(path, module: Classifier, prune: FilterPruningCallback) -> L.Trainer:
    run = trainer(path, 1, prune, enable_checkpointing=False)
    run.fit(module, data())
    return run


def _of_net(prune: FilterPruningCallback):
    from lightning_prune.serialization.record import rerooted

    return rerooted(prune.record, "", "net")


def test_methods_that_remove_channels_only_refuse_depth():
    policy = PruningPolicy({"macs": 0.5}, depth=DEPTH)
    with pytest.raises(ValueError, match="NetAdaptCallback removes channels only"):
        NetAdaptCallback(policy)
    with pytest.raises(ValueError, match="SlimmingCallback removes channels only"):
        SlimmingCallback(policy)
    with pytest.raises(ValueError, match="set this in the PruningPolicy"):
        FilterPruningCallback(policy, depth=True)
