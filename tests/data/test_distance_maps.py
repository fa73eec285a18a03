"""Distance maps from the workers of the data to the loss, and loss weights that depend on the epoch."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torchvision.transforms import v2

from lightning_prune import IPAD, FilterPruningCallback
from lightning_prune.data import BrainSlices, SegmentationData, signed_distances
from lightning_prune.distillation.config import Distillation
from lightning_prune.reporting.epoch_log import EpochHistory
from lightning_prune.segmentation.losses import EpochRamp, WeightedSum
from lightning_prune.segmentation.module import SegmentationModule
from lightning_prune.segmentation.ritnet_losses import EdgeWeightedCrossEntropy, GeneralisedDice, SurfaceLoss
from tests.support.students import QUIET, small_net

pytestmark = QUIET


def slices(distance_maps: bool = True, **kwargs: object) -> BrainSlices:
    return BrainSlices(size=16, slices_per_axis=10, batch_size=4, distance_maps=distance_maps, **kwargs)  # type: ignore[arg-type]


def ritnet_loss(epochs: int = 4) -> WeightedSum:
    parts = {"edge_ce": EdgeWeightedCrossEntropy(), "dice": GeneralisedDice(), "surface": SurfaceLoss()}
    return WeightedSum(parts, {"dice": EpochRamp(1, 0, epochs), "surface": EpochRamp(0, 1, epochs)})


def module(loss: WeightedSum | None = None, **kwargs: object) -> SegmentationModule:
    torch.manual_seed(0)
    shape = (1, 1, 16, 16)
    return SegmentationModule(small_net(), 3, loss or ritnet_loss(), example_input_shape=shape, **kwargs)  # type: ignore[arg-type]


def trainer(tmp_path: Path, epochs: int, *callbacks: L.Callback) -> tuple[L.Trainer, EpochHistory]:
    history = EpochHistory()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    fit = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=history,
        default_root_dir=tmp_path,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        log_every_n_steps=1,
        **quiet,
    )
    return fit, history


def rows(history: EpochHistory, name: str) -> list[float]:
    return [row[name] for row in history.curves]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_contain_the_distances_of_the_augmented_masks(num_workers):
    data = slices(num_workers=num_workers, transform=v2.RandomHorizontalFlip(p=1.0))
    _, mask, distances = next(iter(data.train_dataloader()))
    stored = {mask.numpy().tobytes() for _, mask in data.samples("train")}
    assert mask[0].numpy().tobytes() not in stored  # it is flipped
    for sample, distance in zip(mask, distances, strict=True):
        assert torch.equal(distance, signed_distances(sample, 3))
    assert len(next(iter(data.val_dataloader()))) == 3
    assert len(next(iter(slices(False).val_dataloader()))) == 2


def test_weights_depend_on_the_epoch_and_are_logged(tmp_path):
    fit, history = trainer(tmp_path, 3)
    fit.fit(module(), slices())
    assert rows(history, "loss/weight_dice") == [1.0, 0.75, 0.5]
    assert rows(history, "loss/weight_surface") == [0.0, 0.25, 0.5]
    assert not any("edge_ce" in name for name in history.curves[0])


def test_the_schedule_continues_after_a_resume(tmp_path):
    first, _ = trainer(tmp_path, 2, ModelCheckpoint(tmp_path, filename="half"))
    first.fit(module(), slices())
    second, history = trainer(tmp_path, 4, ModelCheckpoint(tmp_path, filename="whole"))
    second.fit(module(), slices(), ckpt_path=tmp_path / "half.ckpt")
    assert rows(history, "loss/weight_surface")[-2:] == [0.5, 0.75]


def test_the_loss_of_an_epoch_is_the_sum_with_that_epoch_s_weights():
    loss, (image, mask, distances) = ritnet_loss(), next(iter(slices().val_dataloader()))
    logits: Tensor = small_net()(image)
    ce, dice = EdgeWeightedCrossEntropy()(logits, mask), GeneralisedDice()(logits, mask)
    surface = SurfaceLoss()(logits, mask, distances)
    total = loss(logits, mask, distances=distances, epoch=1)
    torch.testing.assert_close(total, ce + 0.75 * dice + 0.25 * surface)


def test_without_maps_the_error_names_the_option(tmp_path):
    fit, _ = trainer(tmp_path, 1)
    with pytest.raises(ValueError, match="set distance_maps=true of the data"):
        fit.fit(module(), slices(False))


def test_distance_maps_without_num_classes_raise():
    class Own(SegmentationData):
        def load(self):
            return {"train": [(torch.zeros(1, 4, 4), torch.zeros(4, 4, dtype=torch.int64))]}

    with pytest.raises(ValueError, match="Own needs an attribute num_classes"):
        Own(distance_maps=True).train_dataloader()


@pytest.mark.parametrize("statistics", ["epoch", "pass"])
def test_pruning_and_distillation_with_batches_of_three_entries(tmp_path, statistics):
    """Statistics, example input, batch norm, teacher and labels are all taken from the batch."""
    pruning = FilterPruningCallback(
        {"macs": 0.6},
        amount={"macs": 0.2},
        start_epoch=0,
        criterion=IPAD(omega=0.5),
        statistics=statistics,
        submodule="net",
        recalibrate_batches=2,
        verbose=False,
    )
    student = module(distillation=Distillation("copy", alpha=1.0, submodule="net", ignore_index=2))
    student.example_input_array = None
    fit, history = trainer(tmp_path, 4, pruning)
    fit.fit(student, slices())
    assert pruning.history[-1].share["macs"] <= 0.6
    assert all(value == value for value in rows(history, "train/loss"))
    assert history.curves[-1]["distill/hinton"] > 0
    assert fit.predict(student, slices())[0].shape[1:] == (16, 16)
