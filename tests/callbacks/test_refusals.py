"""One block cannot be cut: the callback says which layers stay, and prunes the rest to the budget."""

from __future__ import annotations

import copy
import re
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import L2, FilterPruningCallback, Limits, PruningPolicy, SurgeryError, prune_, trace
from lightning_prune.pruning.step import ATTEMPTS, cut_
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.testing import with_dead_filters


def other_factor(net, x):
    return x * (2 if x.shape[1] == 16 else 3)


def demanded_width(net, x):
    if x.shape[1] != 16:
        raise ValueError("takes 16 channels")
    return x


def table(net, x):
    return x * {16: 2.0}[x.shape[1]]


def remembered_width(net, x):
    net.width = net.width or x.shape[1]
    if x.shape[1] != net.width:
        raise RuntimeError("another width than before")
    return x


def width_as_text(net, x):
    return x * float(str(x.shape[1])) / 16


CASES = {
    other_factor: r"aten::mul.Tensor in block, .* 16 units of block\.first\.weight stay",
    demanded_width: r"raises in 'block': takes 16 channels; .* units of .*block\.first\.weight.* stay",
    table: r"raises in 'block': .* units of .*block\.first\.weight.* stay",
    remembered_width: r"another width than before; .* units of .*block\.first\.weight.* stay",
    width_as_text: r"gets the number .*, and 16 in the dense network; .* 16 units of block\.first\.weight stay",
}


class Block(nn.Module):
    def __init__(self, code) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.code, self.width = code, None

    def forward(self, x):
        return self.second(self.code(self, self.first(x)).relu())


class Classifier(L.LightningModule):
    """A block between a stem and further layers; its first layer has the least important filters."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 16, 3, padding=1), block
        self.rest = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.rest(self.block(self.stem(x).relu()).relu())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def pruned_to_half(module: L.LightningModule) -> FilterPruningCallback:
    """Prune in one epoch of a training that leaves the weights as they are."""
    data = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.randint(0, 3, (8,))), 4)
    callback = FilterPruningCallback(
        {"macs": 0.5}, amount={"macs": 0.6}, start_epoch=0, criterion=L2(), limits=Limits(0.95),
        compensate=False, recalibrate_batches=0,
    )  # fmt: skip
    trainer = L.Trainer(
        max_epochs=1, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return callback


def without_removed(dense: nn.Module, record, x: torch.Tensor) -> nn.Module:
    """Return the dense network with the filters zeroed that ``record`` has removed."""
    graph = trace(dense, x)
    removed = [
        np.delete(graph.layers[name], record.kept[name][dim])
        for name, dim in graph.filter_dims.items()
        if dim in record.kept.get(name, {})
    ]
    return with_dead_filters(dense, graph, np.unique(np.concatenate(removed)))


@pytest.mark.parametrize("code", CASES, ids=lambda code: code.__name__)
def test_warning_names_the_layers_that_stay_and_the_rest_meets_the_budget(code):
    module, x = Classifier(Block(code)), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        module.block.first.weight *= 0.01
    dense = copy.deepcopy(module).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = pruned_to_half(module)
    refusals = [str(each.message) for each in caught if "selecting again" in str(each.message)]
    assert len(refusals) == 1
    assert re.search(CASES[code], refusals[0])
    assert callback.history[-1].share["macs"] <= 0.5
    assert module.block.first.out_channels == 16
    torch.testing.assert_close(module.eval()(x), without_removed(dense, callback.record, x)(x))


class Experts(nn.Module):
    """One of three experts, chosen by a value: after a cut another one than in the trace of the dense network."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 12, 1), nn.ReLU(), nn.Conv2d(12, 16, 1)) for _ in range(3)
        )

    def forward(self, x):
        return self.experts[int(x.abs().sum() * 1000) % 3](x)


def test_network_around_experts_that_values_choose_is_pruned():
    torch.manual_seed(0)
    module = Classifier(Experts())
    dense = copy.deepcopy(module).eval()
    callback = pruned_to_half(module)
    assert callback.history[-1].share["macs"] <= 0.5
    assert {expert[0].in_channels for expert in module.block.experts} == {16}
    for number in range(6):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        zeroed = without_removed(copy.deepcopy(dense), callback.record, x)
        torch.testing.assert_close(module.eval()(x), zeroed(x))


@pytest.mark.filterwarnings("ignore:.* stays?, selecting again:UserWarning")
def test_more_refusals_than_attempts_do_not_end_pruning():
    blocks = [nn.Conv2d(6, 6, 1) for _ in range(ATTEMPTS + 3)]
    net = nn.Sequential(nn.Conv2d(3, 6, 1), *blocks, nn.Conv2d(6, 300, 1), nn.Conv2d(300, 2, 1)).eval()
    graph, calls = trace(net, torch.randn(1, 3, 4, 4)), []
    tail = graph.layers[f"{len(blocks) + 1}.weight"]

    def refuse(model, graph, remove, optimizers=()):
        calls.append(remove)
        refused = np.setdiff1d(remove, tail)
        if len(refused):
            raise SurgeryError("refused", refused[:1])
        return prune_(model, graph, remove, optimizers)

    def in_order(graph, model, statistics):
        return np.arange(graph.num_units, dtype=float)

    policy = PruningPolicy({"macs": 0.9}, limits=Limits(1.0))
    plan, _ = cut_(net, graph, policy, in_order, {}, DenseSizes.of(graph), surgery=refuse)
    assert plan.reached
    assert len(calls) > ATTEMPTS
    assert net[-1].in_channels < 300
    assert {block.out_channels for block in blocks} == {6}
