"""A detector is pruned in a Trainer with its own batches, lists of images and targets, and trains on."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_prune import FilterPruningCallback, Limits
from lightning_prune.compensation import CompensationSettings
from lightning_prune.trainer.batches import first_sample
from lightning_prune.utils.example_inputs import example_of_shapes, shapes_of
from tests.support.detectors import collate, detector, scenes


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


def fit(module: Detection, budget: float, epochs: int, **options) -> tuple[FilterPruningCallback, L.Trainer]:
    pruning = FilterPruningCallback(
        {"macs": budget}, start_epoch=0, limits=Limits(0.9), submodule="net", **options
    )
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(scenes(), 2, collate_fn=collate))
    return pruning, trainer


@pytest.mark.parametrize(
    "kind", ["faster", "retina", "mask", pytest.param("ssdlite", marks=pytest.mark.slow)]
)
def test_detector_is_pruned_to_half_and_trains_on(kind):
    module = Detection(kind)
    pruning, trainer = fit(module, 0.5, epochs=3, amount={"macs": 0.3}, compensate=False)
    assert pruning.history[-1].share["macs"] <= 0.5
    assert sum(p.numel() for p in module.net.parameters()) < sum(
        p.numel() for p in detector(kind).parameters()
    )
    assert torch.isfinite(trainer.callback_metrics["loss"])
    module.eval()
    assert set(module([torch.rand(3, 64, 64)])[0]) >= {"boxes", "labels", "scores"}


def test_cut_of_a_detector_is_repaired_with_training_images():
    settings = CompensationSettings(images=4, refit=False)
    pruning, _ = fit(Detection("retina"), 0.8, epochs=1, amount={"macs": 0.3}, compensate=settings)
    (cut,) = pruning.history
    assert cut.not_repaired == ""
    assert cut.change < cut.change_unrepaired


def test_example_is_the_first_image_with_its_target_and_survives_a_checkpoint():
    module, batch = Detection("faster"), collate(scenes())
    (images, targets), kwargs = first_sample(batch, module)
    assert [tuple(image.shape) for image in images] == [(3, 64, 56)]
    assert targets[0]["boxes"].tolist() == [[5.0, 5.0, 40.0, 40.0]]
    (again, same_targets), _ = example_of_shapes(shapes_of(((images, targets), kwargs)))
    assert again[0].shape == images[0].shape
    torch.testing.assert_close(same_targets, targets)
