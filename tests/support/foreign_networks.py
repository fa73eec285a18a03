"""A small network and its data, for trainers other than Lightning's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Pruner

EPOCHS, CUT = 6, 3  # the network is saved after CUT epochs, in the middle of its cuts


class Classifier(nn.Module):
    """Convolutions with a residual sum; returns the loss if it is given labels, as models of Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.inner, self.head = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 3)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Any:
        x = self.norm(self.stem(pixels)).relu()
        logits = self.head((x + self.inner(x)).relu().mean((2, 3)))
        return logits if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(32, 1, 8, 8, generator=generator)
    return TensorDataset(images, (images.mean((1, 2, 3)) * 60).long() % 3)


def loader() -> DataLoader[Any]:
    return DataLoader(samples(), 8)


def pruner_of(net: nn.Module, **arguments: Any) -> Pruner:
    images = samples().tensors[0]
    return Pruner(
        net, images[:1], {"macs": 0.5}, amount={"macs": 0.15}, batches=loader(), verbose=False, **arguments
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def check_pruned(net: nn.Module, pruner: Pruner, cuts_before: int) -> None:
    """Check that half of the MACs are left after cuts before and after the network was saved."""
    assert pruner.finished
    assert pruner.metrics["prune/macs_share"] <= 0.5
    assert 0 < cuts_before < len(pruner.history)
    assert net.get_parameter("head.weight").shape[1] < 12
