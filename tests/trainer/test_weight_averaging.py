"""Tests that averages of the weights are cut with the network, in callbacks and in modules."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from lightning_prune import FilterPruningCallback, trace
from lightning_prune.utils.modules import cut
from tests.callbacks.test_pruning import Tupled, cost, data, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*:UserWarning"),
]
EMA = partial(EMAWeightAveraging, decay=0.9)
SWA = partial(StochasticWeightAveraging, swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=2)


class Validated(Tupled):
    """Keeps the weights with which it is validated."""

    def __init__(self) -> None:
        super().__init__()
        self.validated: list[Tensor] = []

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(self.net[0].weight.detach().clone())
        assert self(batch[0]).isfinite().all()


class AverageAtCut(L.Callback):
    """Keeps the average at the end of the epoch with the only cut: before it or after it, by its place."""

    def __init__(self, averaging: L.Callback) -> None:
        self.averaging = averaging
        self.before: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 2:
            self.before = {
                name: tensor.clone() for name, tensor in self.averaging._average_model.state_dict().items()
            }


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def ordered(pruning: L.Callback, averaging: L.Callback, first: bool) -> list[L.Callback]:
    return [averaging, pruning] if first else [pruning, averaging]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("make", [EMA, WeightAveraging])
def test_an_average_is_cut_like_the_network(make, first):
    averaging, module = make(), Tupled()
    pruning = FilterPruningCallback(
        {"macs": 0.5},
        amount={"macs": 1},
        start_epoch=2,
        optimizer="carry",
        compensate=False,
        recalibrate_batches=0,
    )
    before, after = AverageAtCut(averaging), AverageAtCut(averaging)
    trainer(before, *ordered(pruning, averaging, first), after, epochs=5).fit(module, data())
    assert pruning.record
    for name, tensor in before.before.items():
        kept = pruning.record.kept.get(name.removeprefix("module."), {})
        assert torch.equal(after.before[name], cut(tensor, kept)), name
    assert cost(module) <= 0.5 * cost(Tupled())
    assert not torch.equal(after.before["module.net.0.weight"], module.net[0].weight)  # averaging continues


@pytest.mark.parametrize("optimizer", ["reset", "carry"])
def test_the_average_is_validated_and_is_the_result_of_training(optimizer):
    averaging, module = EMA(), Validated()
    pruning = FilterPruningCallback({"macs": 0.5}, optimizer=optimizer)
    averages: list[Tensor] = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            averages.append(averaging._average_model.module.net[0].weight.detach().clone())

    fit = trainer(Watch(), averaging, pruning, epochs=8, num_sanity_val_steps=0)
    fit.fit(module, data(), data(shuffle=False))
    assert len(pruning.history) > 2
    assert all(torch.equal(a, b) for a, b in zip(module.validated[::4], averages, strict=True))
    assert torch.equal(module.net[0].weight, averaging._average_model.module.net[0].weight)
    assert averaging._average_model.module.net[0].out_channels == module.net[0].out_channels


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("optimizer", ["reset", "carry"])
def test_stochastic_weight_averaging_continues_after_cuts(optimizer, first):
    swa, module = SWA(), Tupled()
    pruning = FilterPruningCallback({"macs": 0.5}, optimizer=optimizer)
    rates: list[float] = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit = trainer(*ordered(pruning, swa, first), Watch(), epochs=8)
    fit.fit(module, data())
    assert max(c.epoch for c in pruning.history) > swa.swa_start
    assert shapes(swa._average_model) == shapes(module)
    for a, b in zip(module.parameters(), swa._average_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-3)  # the result; Lightning makes one more step
    assert swa.n_averaged == 7
    assert rates[-1] == pytest.approx(1e-3)  # SWA's schedule, also after resets
    assert cost(module) <= 0.5 * cost(Tupled())


def test_the_epoch_in_which_swa_renews_norms_has_no_cut():
    swa, module = SWA(), Tupled()
    pruning = FilterPruningCallback({"macs": 0.3}, amount={"macs": 0.05})
    with pytest.warns(UserWarning, match="not met"):
        trainer(swa, pruning, epochs=4).fit(module, data())
    assert [c.epoch for c in pruning.history] == [1, 2, 3]


class Averaging(Tupled):
    """Has an average of its network as submodule, and validates it."""

    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    def on_train_batch_end(self, *args: Any) -> None:
        self.average.update_parameters(self.net)

    def validation_step(self, batch: Any, index: int) -> None:
        assert self.average(batch[0]).shape == (len(batch[0]), 4)


@pytest.mark.parametrize("also", [(), (EMA,)])
def test_an_average_that_the_module_holds_is_cut(also):
    module = Averaging()
    pruning = FilterPruningCallback({"macs": 0.5}, submodule="net")
    callbacks = [make() for make in also]
    trainer(*callbacks, pruning, epochs=8).fit(module, data(), data(shuffle=False))
    assert len(pruning.history) > 2
    assert shapes(module.average.module) == shapes(module.net)
    whole = trace(module.average.module, torch.zeros(1, 1, 12, 12)).cost("macs")
    assert whole <= 0.5 * cost(Tupled())
    for callback in callbacks:
        inner = callback._average_model.module
        assert shapes(inner.average.module) == shapes(inner.net) == shapes(module.net)


def test_a_part_of_the_pruned_network_that_is_averaged_is_cut():
    class Half(Tupled):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(self.net[:3], self.net[3:])
            self.average = AveragedModel(self.net[0])

    module = Half()
    dense = module.average.module[0].weight.detach().clone()
    pruning = FilterPruningCallback({"macs": 0.6}, amount={"macs": 1}, exclude=["1.3"], submodule="net")
    trainer(pruning, epochs=3).fit(module, data())
    assert module.average.module[0].out_channels == module.net[0][0].out_channels < 16
    assert torch.equal(module.average.module[0].weight, dense[pruning.record.kept["0.0.weight"][0]])


def test_an_average_inside_the_pruned_module_is_refused():
    module = Averaging()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"'average' is an average of 'net'; set submodule='net'"):
        trainer(FilterPruningCallback({"macs": 0.5})).fit(module, data(), data(shuffle=False))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))


def test_an_average_that_matches_two_parts_is_refused():
    class Twins(Tupled):
        def __init__(self) -> None:
            super().__init__()
            block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
            head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 144, 4))
            self.net = nn.Sequential(nn.Conv2d(1, 8, 1), block, copy.deepcopy(block), head)
            self.average = AveragedModel(block)

    with pytest.raises(ValueError, match=r"Sequential could be that of 'net.1' or of 'net.2'"):
        trainer(FilterPruningCallback({"macs": 0.5}, submodule="net")).fit(Twins(), data())


def test_an_average_of_another_network_is_not_cut():
    class Other(Tupled):
        def __init__(self) -> None:
            super().__init__()
            self.other = AveragedModel(nn.Conv2d(1, 16, 3))

    module = Other()
    pruning = FilterPruningCallback({"macs": 0.9}, amount={"macs": 1}, submodule="net")
    trainer(pruning, epochs=3).fit(module, data())
    assert pruning.record
    assert module.other.module.out_channels == 16


@pytest.mark.parametrize("make", [EMA, SWA])
def test_a_resumed_run_with_an_average_ends_with_the_same_bits(make, tmp_path: Path):
    def run(folder: Path, resume: Path | None = None) -> Tupled:
        module = Tupled()
        pruning = FilterPruningCallback({"macs": 0.5}, optimizer="carry", verbose=False)
        keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        fit = trainer(pruning, make(), keep, epochs=8, enable_checkpointing=True)
        fit.fit(module, data(shuffle=False), ckpt_path=resume, weights_only=True if resume else None)
        return module

    whole = run(tmp_path)
    again = run(tmp_path / "again", tmp_path / "epoch=4.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_norms_of_an_average_are_recalibrated_with_the_networks():
    averaging, module = EMA(), Tupled()
    pruning = FilterPruningCallback({"macs": 0.5}, amount={"macs": 1}, start_epoch=2, compensate=False)
    trainer(averaging, pruning, epochs=3).fit(module, data())
    module.eval()
    batch = torch.cat([x for x, _ in DataLoader(data().dataset, 16)])
    inner = module.net[0](batch)
    torch.testing.assert_close(module.net[1].running_mean, inner.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
