"""An optimal selection in training: each cut is planned by the program, the budget is met, and the network runs."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import FilterPruningCallback, Limits, OptimalSelection, trace
from lightning_prune.criteria import L2

IMAGE = torch.zeros(1, 1, 8, 8)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 2, 3)
        )
        self.example_input_array = IMAGE

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_cuts_of_a_training_are_optimal_and_meet_the_budget() -> None:
    torch.manual_seed(0)
    module = Module()
    dense = trace(module.net, IMAGE)
    pruning = FilterPruningCallback(
        {"macs": 0.5, "params": 0.6}, criterion=L2(), limits=Limits(0.9), selection=OptimalSelection(time_limit=20),
        amount={"macs": 0.3, "params": 0.3}, start_epoch=0, compensate=False, verbose=False,
    )  # fmt: skip
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, callbacks=[pruning])  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.rand(8, 1, 8, 8)), batch_size=4))
    pruned = trace(module.net, IMAGE)
    assert pruned.cost("macs") <= 0.5 * dense.cost("macs")
    assert pruned.cost("params") <= 0.6 * dense.cost("params")
    assert len(pruning.history) >= 2  # in steps of the amount
