"""Tests that repairs reach averages, and work in every precision, in compiled and checkpointed networks."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from benchmarks.robustness.kill_run import Classifier
from tests.callbacks.test_compensation import Unscheduled, distance, fit, pruning, seed
from tests.callbacks.test_compensation import pytestmark as pytestmark

EMA = partial(EMAWeightAveraging, decay=0.8)
SWA = partial(StochasticWeightAveraging, swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=1)


def average_of(averaging: L.Callback) -> nn.Module:
    model: Any = averaging._average_model  # type: ignore[attr-defined]
    return model.module.net if isinstance(model, AveragedModel) else model.net


class AverageAroundCut(L.Callback):
    """Keeps a copy of the average at the end of the epoch with the cut: before or after it, by its place."""

    def __init__(self, averaging: L.Callback) -> None:
        self.averaging = averaging

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.net = copy.deepcopy(average_of(self.averaging)).eval()


@pytest.mark.parametrize("make", [EMA, SWA])
def test_an_average_is_repaired_by_what_it_gave_itself(make: Any) -> None:
    distances = {}
    for compensate in (False, True):
        seed()
        averaging = make()
        before, after = AverageAroundCut(averaging), AverageAroundCut(averaging)
        fit(Unscheduled(), averaging, before, pruning(compensate=compensate), after)
        distances[compensate] = distance(before.net, after.net)
    assert distances[True] < 0.3 * distances[False]


class Checkpointed(Unscheduled):
    def forward(self, x: Tensor) -> Tensor:
        return self.net[3:](checkpoint(self.net[:3], x, use_reentrant=False))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_cuts_are_repaired_in_every_precision(precision: Any) -> None:
    callback = pruning(amount={"macs": 0.25}, start_epoch=1)
    fit(Unscheduled(), callback, precision=precision)
    assert len(callback.history) > 1
    assert all(cut.change < 0.5 * cut.change_unrepaired for cut in callback.history)


def compiled_whole(module: Classifier) -> Any:
    return torch.compile(module, backend="eager")


def compiled_part(module: Classifier) -> Any:
    module.net.compile(backend="eager")
    return module


@pytest.mark.filterwarnings("ignore:.*(tensor cores|torch.compile):UserWarning")
@pytest.mark.parametrize("compiled", [compiled_whole, compiled_part])
def test_cuts_of_a_compiled_network_are_those_of_the_same_network_uncompiled(compiled: Any) -> None:
    changes = []
    for wrap in (compiled, lambda module: module):
        seed()
        callback = pruning()
        fit(wrap(Unscheduled()), callback)
        changes.append([(cut.change_unrepaired, cut.change) for cut in callback.history])
    torch._dynamo.reset()
    assert changes[0] == [pytest.approx(values, rel=1e-2) for values in changes[1]]
    assert all(after < 0.3 * before for before, after in changes[0])


@pytest.mark.parametrize("submodule", ["net", None])
def test_cuts_of_a_network_with_gradient_checkpointing_are_repaired(submodule: str | None) -> None:
    callback = pruning(submodule=submodule)
    fit(Checkpointed(), callback)
    assert all(cut.change < 0.3 * cut.change_unrepaired for cut in callback.history)
