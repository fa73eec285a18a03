"""A detector is pruned in a Trainer with its own batches, lists of images and targets, and trains on."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from lightning_prune import FilterPruningCallback, Limits
from lightning_prune.trainer.batches import first_sample
from lightning_prune.utils.example_inputs import example_of_shapes, shapes_of


def backbone(width: int = 24) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, width, 3, 2, 1), nn.ReLU(),
    )  # fmt: skip
    layers.out_channels = width
    return layers


def detector(kind: str) -> nn.Module:
    anchors = AnchorGenerator(((16, 32),), ((1.0,),))
    sizes = {"min_size": 64, "max_size": 64}
    pool = MultiScaleRoIAlign(["0"], 3, 2)
    if kind == "retina":
        return RetinaNet(backbone(), 3, anchor_generator=anchors, **sizes)
    if kind == "mask":
        masks = MultiScaleRoIAlign(["0"], 6, 2)
        return MaskRCNN(
            backbone(), 3, rpn_anchor_generator=anchors, box_roi_pool=pool, mask_roi_pool=masks, **sizes
        )
    return FasterRCNN(backbone(), 3, rpn_anchor_generator=anchors, box_roi_pool=pool, **sizes)


class Detection(L.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = detector(kind)

    def forward(self, images, targets=None):
        return self.net(images, targets)

    def training_step(self, batch, batch_idx):
        loss = sum(self(*batch).values())
        self.log("loss", loss, batch_size=2)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def scenes() -> list:
    target = {
        "boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    return [(torch.rand(3, 64, 56 + 8 * (number % 2)), target) for number in range(4)]


def collate(samples: list) -> tuple:
    return tuple(map(list, zip(*samples, strict=True)))


@pytest.mark.parametrize("kind", ["faster", "retina", "mask"])
def test_detector_is_pruned_to_half_and_trains_on(kind):
    module = Detection(kind)
    pruning = FilterPruningCallback(
        {"macs": 0.5},
        amount={"macs": 0.3},
        start_epoch=0,
        limits=Limits(0.9),
        compensate=False,
        submodule="net",
    )
    trainer = L.Trainer(
        max_epochs=3, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(scenes(), 2, collate_fn=collate))
    assert pruning.history[-1].share["macs"] <= 0.5
    assert sum(p.numel() for p in module.net.parameters()) < sum(
        p.numel() for p in detector(kind).parameters()
    )
    assert torch.isfinite(trainer.callback_metrics["loss"])
    module.eval()
    assert set(module([torch.rand(3, 64, 64)])[0]) >= {"boxes", "labels", "scores"}


def test_example_is_the_first_image_with_its_target_and_survives_a_checkpoint():
    module, batch = Detection("faster"), collate(scenes())
    (images, targets), kwargs = first_sample(batch, module)
    assert [tuple(image.shape) for image in images] == [(3, 64, 56)]
    assert targets[0]["boxes"].tolist() == [[5.0, 5.0, 40.0, 40.0]]
    (again, same_targets), _ = example_of_shapes(shapes_of(((images, targets), kwargs)))
    assert again[0].shape == images[0].shape
    torch.testing.assert_close(same_targets, targets)
