"""Tests that Fabric and Accelerate train, prune to half, save and resume with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch.nn.functional import cross_entropy

from lightning_prune import Pruner
from lightning_prune.criteria import TaylorWeight
from tests.support.foreign_networks import CUT, EPOCHS, Classifier, check_pruned, loader, pruner_of, same

CRITERIA = [None, TaylorWeight()]


def epoch_of(
    net: Any, optimizer: Any, batches: Any, backward: Callable[[Any], Any], pruner: Pruner, epoch: int
) -> list[float]:
    losses = []
    for images, labels in batches:
        with pruner.observe():
            loss = cross_entropy(net(images), labels)
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
        losses.append(loss.item())
    pruner.step(optimizer, epoch)
    return losses


def fabric_parts(criterion: Any) -> tuple[Classifier, Fabric, dict[str, Any]]:
    fabric, net = Fabric(accelerator="cpu", devices=1), Classifier()
    pruner = pruner_of(net, criterion=criterion)
    wrapped, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), 1e-2))
    return net, fabric, {"pruner": pruner, "model": wrapped, "optimizer": optimizer}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_fabric_prunes_to_half_and_resumes_with_the_same_bits(tmp_path: Path, criterion: Any) -> None:
    def train(fabric: Fabric, parts: dict[str, Any], epochs: range) -> list[float]:
        net, optimizer, pruner = parts["model"], parts["optimizer"], parts["pruner"]
        return [
            loss
            for epoch in epochs
            for loss in epoch_of(net, optimizer, loader(), fabric.backward, pruner, epoch)
        ]

    net, fabric, parts = fabric_parts(criterion)
    train(fabric, parts, range(CUT))
    cuts = len(parts["pruner"].history)
    fabric.save(tmp_path / "half.ckpt", parts)
    losses = train(fabric, parts, range(CUT, EPOCHS))
    check_pruned(net, parts["pruner"], cuts)

    again, fabric, parts = fabric_parts(criterion)
    fabric.load(tmp_path / "half.ckpt", parts)
    assert train(fabric, parts, range(CUT, EPOCHS)) == losses
    assert same(again, net)


def accelerate_parts(criterion: Any) -> tuple[Classifier, Any, Any, Any, Any, Pruner]:
    accelerate = pytest.importorskip("accelerate")
    accelerator, net = accelerate.Accelerator(cpu=True), Classifier()
    pruner = pruner_of(net, criterion=criterion)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    wrapped, optimizer, batches = accelerator.prepare(net, optimizer, loader())

    def save(models: Any, weights: Any, folder: str) -> None:
        torch.save(pruner.state_dict(), Path(folder) / "pruner.pt")

    def load(models: Any, folder: str) -> None:
        pruner.load_state_dict(torch.load(Path(folder) / "pruner.pt", weights_only=True))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return net, accelerator, wrapped, optimizer, batches, pruner


@pytest.mark.parametrize("criterion", CRITERIA)
def test_accelerate_prunes_to_half_and_resumes_with_the_same_bits(tmp_path: Path, criterion: Any) -> None:
    def train(parts: Any, epochs: range) -> list[float]:
        _, accelerator, wrapped, optimizer, batches, pruner = parts
        return [
            loss
            for epoch in epochs
            for loss in epoch_of(wrapped, optimizer, batches, accelerator.backward, pruner, epoch)
        ]

    parts = net, accelerator, *_, pruner = accelerate_parts(criterion)
    train(parts, range(CUT))
    cuts = len(pruner.history)
    accelerator.save_state(str(tmp_path / "half"))
    losses = train(parts, range(CUT, EPOCHS))
    check_pruned(net, pruner, cuts)

    parts = again, accelerator, *_ = accelerate_parts(criterion)
    accelerator.load_state(str(tmp_path / "half"))
    assert train(parts, range(CUT, EPOCHS)) == losses
    assert same(again, net)
