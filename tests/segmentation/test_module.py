"""SegmentationModule: dataset mIoU, losses, optimizers, errors, and parameters that are cut during training."""

from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from lightning_prune.data.masks import check_mask
from lightning_prune.segmentation.module import SegmentationModule, check_logits

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .* does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)


class Echo(nn.Module):
    """Network whose predicted class is the value of the image's only channel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, image):
        return (
            self.weight * nn.functional.one_hot(image[:, 0].long(), self.classes).permute(0, 3, 1, 2).float()
        )


def trainer(**kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", enable_model_summary=False, **(quiet | kwargs))


def by_hand(predicted, target, classes, ignore=None):
    """IoU per class by counting pixels in a loop."""
    confusion = np.zeros((classes, classes))
    for p, t in zip(predicted.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != ignore:
            confusion[t, p] += 1
    hit = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return [h / u if u else float("nan") for h, u in zip(hit, union, strict=True)]


def samples(predicted, target):
    return [(p[None].float(), t) for p, t in zip(predicted, target, strict=True)]


def random_maps(n=5, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, 0, classes, generator=generator)
    # images with different classes, so that the mean over images is another number
    target = torch.stack([draw((8, 8)).clamp(max=i % classes) for i in range(n)])
    predicted = torch.where(draw((n, 8, 8)) > 0, target, draw((n, 8, 8)))
    return predicted, target


@pytest.mark.parametrize("stage", ["val", "test"])
def test_miou_is_computed_over_the_whole_data_set(stage):
    predicted, target = random_maps()
    module = SegmentationModule(Echo(3), 3, class_names=["a", "b", "c"])
    loader = DataLoader(samples(predicted, target), batch_size=2)
    run = trainer()
    (logged,) = (run.validate if stage == "val" else run.test)(module, loader, verbose=False)
    expected = by_hand(predicted, target, 3)
    ious = [logged[f"{stage}/iou_{name}"] for name in "abc"]
    assert ious == pytest.approx(expected)
    assert logged[f"{stage}/miou"] == pytest.approx(np.mean(expected))
    per_image = [np.nanmean(by_hand(p, t, 3)) for p, t in zip(predicted, target, strict=True)]
    assert logged[f"{stage}/miou"] != pytest.approx(np.mean(per_image), abs=0.02)
    loss = nn.functional.cross_entropy(Echo(3)(predicted[:, None]), target).item()
    assert logged[f"{stage}/loss"] == pytest.approx(loss)


def test_train_miou_and_loss_are_computed_over_the_epoch():
    predicted, target = random_maps()
    module = SegmentationModule(Echo(3), 3, optimizer=partial(torch.optim.SGD, lr=0.0))
    run = trainer(max_epochs=2)
    loader = DataLoader(samples(predicted, target), batch_size=2)
    run.fit(module, loader, loader)
    assert run.callback_metrics["train/miou"] == pytest.approx(np.mean(by_hand(predicted, target, 3)))
    loss = nn.functional.cross_entropy(Echo(3)(predicted[:, None]), target).item()
    assert run.callback_metrics["train/loss"] == pytest.approx(loss)


def test_metrics_are_reset_between_epochs():
    predicted, target = random_maps()
    module = SegmentationModule(Echo(3), 3)
    run = trainer()
    run.validate(module, DataLoader(samples(target, target), batch_size=2), verbose=False)
    (logged,) = run.validate(module, DataLoader(samples(predicted, target), batch_size=2), verbose=False)
    assert logged["val/miou"] == pytest.approx(np.mean(by_hand(predicted, target, 3)))


def test_an_epoch_resumed_after_its_validation_logs_no_train_miou(tmp_path):
    class Save(L.Callback):
        def on_validation_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "validated.ckpt")

    def fit(resume=None):
        fresh = trainer(max_epochs=1, num_sanity_val_steps=0, callbacks=[] if resume else [Save()])
        data = DataLoader(samples(*random_maps(4)), batch_size=2)
        fresh.fit(SegmentationModule(Echo(3), 3), data, data, ckpt_path=resume)
        return fresh.callback_metrics

    assert "train/miou" in fit()
    assert "train/miou" not in fit(tmp_path / "validated.ckpt")


def test_a_class_that_never_occurs_is_nan_and_not_in_the_mean():
    predicted, target = random_maps(classes=3)
    module = SegmentationModule(Echo(4), 4)
    (logged,) = trainer().validate(module, DataLoader(samples(predicted, target)), verbose=False)
    assert np.isnan(logged["val/iou_3"])
    assert logged["val/miou"] == pytest.approx(np.mean(by_hand(predicted, target, 3)))


def test_the_iou_of_a_class_that_is_only_predicted_is_zero():
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    predicted = target.clone()
    predicted[0, 0, 0] = 1
    (logged,) = trainer().validate(
        SegmentationModule(Echo(2), 2), DataLoader(samples(predicted, target)), verbose=False
    )
    assert logged["val/iou_1"] == 0
    assert logged["val/miou"] == pytest.approx(15 / 16 / 2)


@pytest.mark.parametrize("ignore", [255, 0])
def test_ignored_pixels_are_in_neither_metric_nor_loss(ignore):
    predicted, target = random_maps()
    target[:, :3] = ignore
    module = SegmentationModule(Echo(3), 3, ignore_index=ignore)
    (logged,) = trainer().validate(
        module, DataLoader(samples(predicted, target), batch_size=5), verbose=False
    )
    expected = by_hand(predicted, target, 3, ignore)
    counted = [iou for c, iou in enumerate(expected) if c != ignore]
    assert logged["val/miou"] == pytest.approx(np.mean(counted))
    keep = target != ignore
    logits = Echo(3)(predicted[:, None]).permute(0, 2, 3, 1)[keep]
    assert logged["val/loss"] == pytest.approx(nn.functional.cross_entropy(logits, target[keep]).item())


def test_training_reduces_the_loss():
    torch.manual_seed(0)
    image = torch.rand(16, 1, 8, 8)
    data = [(x, (x[0] > 0.5).long()) for x in image]
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    module = SegmentationModule(net, 2, optimizer=partial(torch.optim.Adam, lr=0.05))
    loader = DataLoader(data, batch_size=4)
    (before,) = trainer().validate(module, loader, verbose=False)
    trainer(max_epochs=10).fit(module, loader, loader)
    (after,) = trainer().validate(module, loader, verbose=False)
    assert after["val/loss"] < 0.5 * before["val/loss"]
    assert after["val/miou"] > 0.9


def test_plateau_scheduler_uses_the_monitor():
    predicted, target = random_maps()
    loader = DataLoader(samples(predicted, target), batch_size=5)
    module = SegmentationModule(
        Echo(3),
        3,
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        scheduler=partial(ReduceLROnPlateau, mode="max", factor=0.1, patience=0),
        monitor="val/miou",
    )
    run = trainer(max_epochs=3)
    run.fit(module, loader, loader)
    # the mIoU is constant: the first epoch sets the best, each of the two others lowers the rate
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)


def test_plateau_scheduler_in_the_wrong_direction_is_refused():
    module = SegmentationModule(Echo(3), 3, scheduler=ReduceLROnPlateau, monitor="val/miou")
    with pytest.raises(ValueError, match="mode='max'"):
        module.configure_optimizers()


def test_optimizer_gets_the_parameters_that_require_gradients():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    net[0].requires_grad_(False)
    optimizer = SegmentationModule(net, 2).configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["lr"] == 1e-3
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net[1].parameters()}


def test_the_error_of_a_mask_out_of_range_names_number_classes_and_remedy():
    data = [(torch.zeros(1, 4, 4), torch.full((4, 4), 7))]
    with pytest.raises(ValueError, match=r"class number 7, but num_classes=3 .*ignore_index=7"):
        trainer(max_epochs=1).fit(SegmentationModule(Echo(3), 3), DataLoader(data), DataLoader(data))
    with pytest.raises(ValueError, match="class number -1"):
        check_mask(torch.tensor([0, -1, 255]), 2, ignore_index=255)


def test_logits_that_do_not_fit_are_refused():
    mask = torch.zeros(2, 8, 8, dtype=torch.int64)
    with pytest.raises(TypeError, match="dict"):
        check_logits({"out": torch.zeros(2, 3, 8, 8)}, mask, 3)
    with pytest.raises(ValueError, match="num_classes=3"):
        check_logits(torch.zeros(2, 4, 8, 8), mask, 3)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\)"):
        check_logits(torch.zeros(2, 3, 4, 4), mask, 3)


@pytest.mark.parametrize("names", [["a"], ["a", "a"]])
def test_class_names_must_fit(names):
    with pytest.raises(ValueError, match="class_names must be 2"):
        SegmentationModule(Echo(2), 2, class_names=names)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="2 classes"):
        SegmentationModule(Echo(1), 1)


def test_forward_is_the_net_and_example_input_fits():
    net = nn.Conv2d(3, 2, 1)
    module = SegmentationModule(net, 2, example_input_shape=(2, 3, 5, 5))
    image = module.example_input_array
    assert image.shape == (2, 3, 5, 5)
    assert torch.equal(module(image), net(image))
    assert SegmentationModule(net, 2).example_input_array is None


def test_predict_returns_classes_with_and_without_masks():
    predicted, target = random_maps()
    loader = DataLoader(samples(predicted, target), batch_size=5)
    module = SegmentationModule(Echo(3), 3)
    assert torch.equal(trainer().predict(module, loader)[0], predicted)
    alone = DataLoader(predicted[:, None].float(), batch_size=5)
    assert torch.equal(trainer().predict(module, alone)[0], predicted)


def test_parameters_can_be_cut_in_place_during_training():
    """Pruning gives `p.data` another shape and keeps the Parameter."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1))
    module = SegmentationModule(net, 2)
    data = DataLoader([(torch.rand(1, 4, 4), torch.zeros(4, 4, dtype=torch.int64))] * 2)
    trainer(max_epochs=1).fit(module, data, data)
    for p, cut in zip(
        net.parameters(), (slice(3), slice(3), (slice(None), slice(3)), slice(None)), strict=True
    ):
        p.data, p.grad = p.data[cut].clone(), None
    before = net[1].weight.detach().clone()
    trainer(max_epochs=1).fit(module, data, data)
    assert net[1].weight.shape == (2, 3, 1, 1)
    assert not torch.equal(net[1].weight, before)
    assert sum(p.numel() for p in module.parameters()) == 3 + 3 + 6 + 2
