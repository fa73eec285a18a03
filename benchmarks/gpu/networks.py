"""Networks, data and the LightningModule that the checks share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from benchmarks.gpu.checks import Place
from lightning_prune import L2, FilterPruningCallback, Limits, PruningPolicy, one_shot, select, trace
from lightning_prune.distillation.mixin import DistillationMixin

__all__ = [
    "CUTS",
    "Segmenter",
    "SmallUnet",
    "gradual",
    "images",
    "l2_units",
    "loader",
    "loader_on_device",
    "pruned",
    "trainer_of",
    "unet",
]

CUTS = 3
LIMITS = Limits(0.95)


def images(number: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return noisy images (number, 3, size, size) of random shapes, and the masks (number, 1, size, size) of these.

    The masks can be learnt: each pixel of the first channel is noise around the value of its mask.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(number, 1, 4, 4, generator=generator)
    masks = (F.interpolate(coarse, size=(size, size), mode="bilinear") > 0).float()
    noise = torch.randn(number, 3, size, size, generator=generator)
    return 0.7 * noise + torch.cat((masks, -masks, 0 * masks), 1), masks


def loader(place: Place, batch: int = 8, batches: int = 6, size: int | None = None) -> DataLoader:
    """Return a loader of :func:`images`, in pinned memory for a GPU."""
    data = TensorDataset(*images(batch * batches, size or place.pick(96, 16)))
    return DataLoader(data, batch, pin_memory=place.device.type == "cuda")


def loader_on_device(place: Place, batch: int, batches: int, size: int) -> DataLoader:
    """Return a loader of :func:`images` that are on the device already, so that training does not wait for data."""
    data = TensorDataset(*(tensor.to(place.device) for tensor in images(batch * batches, size)))
    return DataLoader(
        data, batch_size=None, sampler=BatchSampler(SequentialSampler(data), batch, drop_last=True)
    )


class SmallUnet(nn.Module):
    """Two levels with batch norm, dropout and a skip connection."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        block = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.down = nn.Sequential(block(3, width), nn.BatchNorm2d(width), nn.ReLU())
        self.inner = nn.Sequential(
            block(width, 2 * width, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Dropout2d(0.05)
        )
        self.up = nn.Sequential(block(3 * width, width), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 1, h, w) of images (n, 3, h, w)."""
        outer = self.down(x)
        inner = F.interpolate(self.inner(outer), scale_factor=2.0, mode="nearest")
        return self.head(self.up(torch.cat((outer, inner), 1)))


def unet(place: Place, seed: int = 0) -> nn.Module:
    """Return a U-Net with a ResNet-18, or a tiny one, on the CPU."""
    torch.manual_seed(seed)
    return (
        SmallUnet() if place.small else smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=1)
    )


class Segmenter(DistillationMixin, L.LightningModule):
    """Trains a network to segment :func:`images`; keeps the loss of every step.

    Args:
        net: to train.
        fused: whether AdamW is fused; if not, it is capturable on a GPU: its rate and its steps are tensors there.
        channels_last: whether images get that memory format; the network must have it already.
    """

    def __init__(self, net: nn.Module, fused: bool = True, channels_last: bool = False) -> None:
        super().__init__()
        self.net, self.fused, self.channels_last = net, fused, channels_last
        self.losses: list[list[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x)

    def on_train_epoch_start(self) -> None:
        """Begin a list of losses."""
        self.losses.append([])

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the cross-entropy of the masks."""
        loss = self._loss(batch)
        if self.losses:
            self.losses[-1].append(loss.detach().float())  # no wait for the device
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        """Log the loss."""
        self.log("val/loss", self._loss(batch))

    def _loss(self, batch: Any) -> Tensor:
        x = batch[0].contiguous(memory_format=torch.channels_last) if self.channels_last else batch[0]
        logits = self(x)
        return F.binary_cross_entropy_with_logits(logits, batch[1].to(logits.dtype))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        if self.fused or self.device.type != "cuda":
            return torch.optim.AdamW(self.parameters(), 3e-3, fused=self.fused)
        rate = torch.tensor(3e-3, device=self.device)
        return torch.optim.AdamW(self.parameters(), rate, capturable=True)

    def mean_losses(self) -> list[float]:
        """Return the mean loss of each epoch."""
        return [round(float(torch.stack(epoch).mean()), 4) for epoch in self.losses if epoch]


def gradual(share: float = 0.5, cuts: int = CUTS, **options: Any) -> FilterPruningCallback:
    """Return a callback that reaches a share of the MACs by cuts at the end of the first epochs."""
    return FilterPruningCallback(
        {"macs": share},
        amount={"macs": (1 - share) / cuts},
        submodule="net",
        verbose=False,
        **{"limits": LIMITS, "start_epoch": 0, **options},
    )


def trainer_of(
    place: Place, callbacks: Sequence[L.Callback], epochs: int = CUTS + 2, **options: Any
) -> L.Trainer:
    """Return a trainer on one device that writes nothing unless the options say so."""
    defaults: dict[str, Any] = {
        "accelerator": place.accelerator, "devices": 1, "max_epochs": epochs, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": place.folder,
    }  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def l2_units(net: nn.Module, example: Tensor, share: float, multiple: int = 1) -> list[int]:
    """Return the units that the norm of filters removes to reach a share of the MACs."""
    graph = trace(net, example)
    scores = L2()(graph, net, {})
    plan = select(graph, scores, {"macs": share}, limits=LIMITS, channel_multiple=multiple)
    return [int(unit) for unit in plan.remove]


def pruned(net: nn.Module, example: Tensor, share: float, multiple: int = 1) -> nn.Module:
    """Return a copy with a share of the MACs, cut by the norm of filters."""
    small = copy.deepcopy(net)
    if share < 1:
        policy = PruningPolicy({"macs": share}, limits=LIMITS, channel_multiple=multiple)
        one_shot(small, example, policy, L2())
    return small
