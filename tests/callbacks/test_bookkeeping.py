"""Tests that the package's own bookkeeping runs no user code: computed weights, properties, lazy attributes."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterPruningCallback, SlimmingCallback, prune_, trace
from lightning_prune.callbacks.method_callback import PruningCallback
from lightning_prune.criteria import IPAD, L2, TaylorGate
from lightning_prune.serialization.carried_record import carried_record, regrow_
from lightning_prune.trainer.followers import has_hook

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(many workers|GPU available|not met|limits may stop|LeafSpec|in eval mode|were not estimated anew)"
)


class Counted(nn.Module):
    """A parametrisation that counts how often a weight is computed from it."""

    def __init__(self, counts: Counter[str], name: str) -> None:
        super().__init__()
        self.__dict__["counts"], self.__dict__["name"] = counts, name

    def forward(self, weight: Tensor) -> Tensor:
        self.counts[self.name] += 1
        return weight * 2


def counted(counts: Counter[str]) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )
    for name in ("0", "3", "8"):
        parametrize.register_parametrization(
            net.get_submodule(name), "weight", Counted(counts, name), unsafe=True
        )
    parametrize.register_parametrization(net[3], "bias", Counted(counts, "3"), unsafe=True)
    counts.clear()
    return net


class Module(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(module: L.LightningModule, *callbacks: L.Callback, epochs: int) -> L.Trainer:
    data = DataLoader(TensorDataset(torch.rand(16, 1, 8, 8), torch.arange(16) % 2), 4)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return trainer


def observing(criterion: Any) -> FilterPruningCallback:
    """Return a callback that observes every epoch and does not cut before the end of the third."""
    return FilterPruningCallback(
        {"macs": 0.5},
        criterion=criterion,
        start_epoch=2,
        compensate=False,
        recalibrate_batches=0,
        verbose=False,
    )


@pytest.mark.parametrize("criterion", [IPAD(omega=0.5), IPAD(omega=0.25, terms="energy"), L2(), TaylorGate()])
def test_statistics_of_training_compute_no_weight(criterion: Any) -> None:
    numbers = []
    for callbacks in ([], [observing(criterion)]):
        counts: Counter[str] = Counter()
        module = Module(counted(counts))
        traced = Counter[str]()
        if callbacks:
            trace(module, torch.zeros(1, 1, 8, 8))  # the only forwards beside those of training
            traced, _ = counts.copy(), counts.clear()
        fit(module, *callbacks, epochs=2)
        counts.subtract(
            {name: number * 2 for name, number in traced.items()}
        )  # the policy's, and its prediction's
        numbers.append(counts)
    plain, pruned = numbers
    assert plain["0"] == 8
    assert all(pruned[name] <= plain[name] for name in plain)


def test_cutting_and_growing_compute_no_weight_beyond_the_traces() -> None:
    counts: Counter[str] = Counter()
    net = counted(counts)
    graph = trace(net, torch.zeros(1, 1, 8, 8))
    traced, _ = counts.copy(), counts.clear()
    prune_(net, graph, graph.layers["0.parametrizations.weight.original"][:3])
    assert counts == traced  # the proof traces once
    counts.clear()
    regrow_(net)
    assert counts == Counter()
    assert net[0].out_channels == 12


@pytest.mark.parametrize("make", [FilterPruningCallback, SlimmingCallback])
def test_spectral_norm_trains_as_without_the_callback_until_the_first_cut(
    make: type[PruningCallback],
) -> None:
    class Keep(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.state = copy.deepcopy(
                dict(pl_module.state_dict())
            )  # in the end, of the second and last epoch

    def trained(*callbacks: L.Callback) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = counted(Counter())
        for name in ("0", "3", "8"):
            parametrize.remove_parametrizations(net.get_submodule(name), "weight")
        parametrize.remove_parametrizations(net[3], "bias")
        parametrizations.spectral_norm(net[0])
        module = Module(net)
        torch.manual_seed(1)
        fit(module, *callbacks, keep := Keep(), epochs=2)
        return keep.state

    options: dict[str, Any] = {"verbose": False}
    if make is FilterPruningCallback:
        options |= {"start_epoch": 5, "criterion": IPAD(omega=0.5)}
    else:
        options |= {"end_epoch": 9, "rho": 0.0, "shrink_at": 0.99}
    with_callback, without = trained(make({"macs": 0.5}, **options)), trained()
    assert with_callback.keys() == without.keys()
    assert all(torch.equal(value, without[name]) for name, value in with_callback.items())


class Lazy(nn.Module):
    """Raises if anybody asks for what it does not have, or reads a property that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1)

    @property
    def groups(self) -> int:
        raise AssertionError("a property was read")

    @property
    def bias(self) -> Tensor:
        raise AssertionError("a property was read")

    def __getattr__(self, name: str) -> Any:
        if name not in ("conv", "_compiled_call_impl"):
            raise AssertionError(f"{name!r} was asked for")
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_no_property_and_no_lazy_attribute_is_read() -> None:
    net = nn.Sequential(nn.Conv2d(1, 12, 3), Lazy(), nn.ReLU(), nn.Flatten(), nn.Linear(432, 2))
    module = Module(net)
    assert not has_hook(module, "net.1")
    callback = FilterPruningCallback({"macs": 0.5}, amount={"macs": 0.3}, start_epoch=0, verbose=False)
    fit(module, callback, epochs=2)
    assert callback.record is not None
    assert callback.record == carried_record(module)
