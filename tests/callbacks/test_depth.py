"""Tests of training in which residual blocks vanish."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
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
