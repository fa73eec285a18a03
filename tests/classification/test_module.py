"""ClassificationModule: accuracy, loss, errors, and pruning in training."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import FilterPruningCallback, OneShot
from lightning_prune.classification import ClassificationModule, cifar_resnet
from lightning_prune.distillation import Distillation

pytestmark = pytest.mark.filterwarnings(
    "ignore:the teacher is worse",
    "ignore:The .* does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated",
)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options)


class Constant(nn.Module):
    """Return the pixels as logits."""

    def forward(self, image):
        return image.flatten(1)


def test_accuracy_and_loss_are_those_of_all_images_although_batches_differ_in_size():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 1, 1, 4, generator=generator)
    labels = torch.randint(4, (10,), generator=generator)
    module = ClassificationModule(Constant(), num_classes=4)
    loader = DataLoader(list(zip(images, labels, strict=True)), batch_size=4)
    (scores,) = trainer().test(module, loader, verbose=False)
    logits = images.flatten(1)
    assert scores["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert scores["test/loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert torch.equal(module.predict_step(images, 0), logits.argmax(1))


def test_wrong_shapes_and_class_numbers_are_named():
    module = ClassificationModule(Constant(), num_classes=4)
    image = torch.zeros(2, 1, 1, 4)
    with pytest.raises(ValueError, match=r"logits \(2, 4\) for targets \(2, 8, 8\)"):
        module.step((image, torch.zeros(2, 8, 8, dtype=torch.int64)), "train")
    with pytest.raises(ValueError, match=r"target has class number 4, but num_classes=4"):
        module.step((image, torch.tensor([0, 4])), "train")
    with pytest.raises(ValueError, match="num_classes=1"):
        ClassificationModule(Constant(), num_classes=1)


def test_a_plateau_scheduler_must_know_that_the_accuracy_rises():
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    module = ClassificationModule(nn.Linear(2, 2), 2, scheduler=plateau, monitor="val/accuracy")
    with pytest.raises(ValueError, match="mode='max'"):
        module.configure_optimizers()


def test_training_prunes_distils_and_raises_the_accuracy():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    images = 0.1 * torch.randn(64, 1, 8, 8, generator=generator) + labels[:, None, None, None]
    loader = DataLoader(list(zip(images, labels, strict=True)), batch_size=16)
    L.seed_everything(0, verbose=False)
    module = ClassificationModule(
        cifar_resnet(8, num_classes=4, width=8),
        num_classes=4,
        example_input_shape=(1, 1, 8, 8),
        distillation=Distillation("copy", alpha=0.5, temperature=1.0, submodule="net"),
    )
    before = sum(p.numel() for p in module.net.parameters())
    pruning = FilterPruningCallback({"macs": 0.5}, start_epoch=3, schedule=OneShot())
    fit = trainer(max_epochs=8, callbacks=[pruning], log_every_n_steps=1)
    fit.fit(module, loader, loader)
    assert sum(p.numel() for p in module.net.parameters()) < 0.7 * before
    assert fit.callback_metrics["val/accuracy"] == 1.0  # since the sixth epoch; 0.75 at the cut
