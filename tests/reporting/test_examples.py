"""Example images: which are chosen, what networks make of them, and that looking at them changes no training."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import FilterPruningCallback, OneShot
from lightning_prune.reporting.epoch_log import EpochHistory
from lightning_prune.reporting.examples import SIDE, Examples, NoExamples, choose, predict
from lightning_prune.reporting.run_observer import RunObserver
from lightning_prune.segmentation import SegmentationModule
from tests.support.run_folders import examples


def sample(height: int, width: int, classes: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, height, width, generator=generator)
    return image, (image[0] * classes).long()


def test_the_richest_image_of_each_part_is_chosen() -> None:
    plain, rich = torch.zeros(4, 4).long(), torch.arange(16).reshape(4, 4)
    masks = [rich if number in (2, 9) else plain for number in range(12)]
    assert choose([(torch.zeros(1, 4, 4), mask) for mask in masks], count=2) == [2, 9]


def test_as_many_classes_as_possible_are_chosen() -> None:
    labels = [0, 0, 0, 1, 1, 2]
    assert choose([(torch.zeros(1, 4, 4), torch.tensor(label)) for label in labels], count=3) == [0, 3, 5]


def test_images_of_unequal_size_are_predicted_one_by_one() -> None:
    samples = [sample(8, 8), sample(12, 20), sample(2 * SIDE, SIDE)]
    net = nn.Conv2d(1, 2, 1)
    found = predict(net, samples, [0, 1, 2], "final", ["no", "yes"])
    assert [image.shape for image in found.images] == [(8, 8), (12, 20), (SIDE, SIDE // 2)]
    assert [mask.shape for mask in found.outputs["final"]] == [(8, 8), (12, 20), (SIDE, SIDE // 2)]
    expected = net(samples[1][0][None])[0].argmax(0)
    assert np.array_equal(found.outputs["final"][1], expected.numpy())
    assert np.array_equal(found.targets[1], samples[1][1].numpy())
    assert np.array_equal(found.images[0], (255 * samples[0][0][0]).round().byte().numpy())


def test_class_probabilities_are_those_of_the_network() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    samples = [(torch.rand(1, 4, 4), torch.tensor(2))]
    found = predict(net, samples, [0], "dense")
    assert np.allclose(found.outputs["dense"][0], net(samples[0][0][None]).softmax(1)[0].detach())
    assert list(found.classes) == ["0", "1", "2"]
    assert not found.is_segmentation


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"image": torch.rand(1, 4, 4)}], r"not \(image, target\)"),
        ([(torch.rand(4), torch.zeros(()))], r"but \(4,\) with \(\)"),
        ([], "cannot be read image by image"),
        (iter([sample(4, 4)]), "cannot be read image by image"),
    ],
)
def test_other_data_are_refused_with_the_reason(samples: object, message: str) -> None:
    with pytest.raises(NoExamples, match=message):
        choose(samples)


def test_a_network_that_returns_no_logits_is_refused() -> None:
    class Boxes(nn.Module):
        def forward(self, image: Tensor) -> dict[str, Tensor]:
            return {"boxes": image}

    with pytest.raises(NoExamples, match="returns no logits"):
        predict(Boxes(), [sample(4, 4)], [0], "final")


def test_examples_are_the_same_after_saving_and_loading(tmp_path: Path) -> None:
    before = examples()
    before.save(tmp_path)
    after = Examples.load(tmp_path)
    assert after.shows_same_images(before)
    assert list(after.outputs) == ["dense", "final"]
    assert all(map(np.array_equal, after.outputs["final"], before.outputs["final"]))
    assert (after.classes, after.dense_epoch, after.numbers) == (["other", "grey", "white"], 2, [0, 1])


class Noisy(nn.Module):
    """A network whose training depends on dropout, running statistics and the modes of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def trained(
    tmp_path: Path, observed: bool
) -> tuple[dict[str, Tensor], RunObserver, EpochHistory, L.LightningModule]:
    L.seed_everything(3, verbose=False)
    module = SegmentationModule(Noisy(), num_classes=2, example_input_shape=(1, 1, 8, 8))
    pruning = FilterPruningCallback(
        {"macs": 0.5}, start_epoch=1, schedule=OneShot(), submodule="net", verbose=False
    )
    observer, history = RunObserver(pruning), EpochHistory()
    loader = DataLoader([sample(8, 8, seed=seed) for seed in range(8)], batch_size=4)
    callbacks = [*([observer] if observed else []), pruning]
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=history,
        callbacks=callbacks,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader, loader)
    return module.state_dict(), observer, history, module


def test_looking_at_images_does_not_change_the_training(tmp_path: Path) -> None:
    with_observer, observer, history, module = trained(tmp_path, True)
    without, *_ = trained(tmp_path, False)
    assert with_observer.keys() == without.keys()
    assert all(torch.equal(with_observer[name], without[name]) for name in without)
    assert [row["lr"] for row in history.curves] == pytest.approx([1e-3] * 3)
    found = observer.finish(module)
    assert set(found.outputs) == {"dense", "final"}
    assert found.dense_epoch == 2
    assert observer.problem == ""


def test_without_validation_data_the_reason_is_kept() -> None:
    module = SegmentationModule(Noisy(), num_classes=2)
    with pytest.raises(NoExamples, match="no validation data"):
        RunObserver(None).finish(module)
