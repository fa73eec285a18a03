"""BrainSlices: labels, blocks with gaps, blanked voxels, seeds and workers."""

from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_prune.data import BrainSlices, brain
from lightning_prune.data import icbm152 as template
from lightning_prune.data.brain import AXES, TEST, TRAIN, VAL
from lightning_prune.data.icbm152 import extent, load_template
from lightning_prune.segmentation.module import SegmentationModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .* does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)
STAGES = ("train", "val", "test")


@pytest.fixture(scope="module")
def slices():
    """A small set, shared by the tests that need no other."""
    data = BrainSlices(size=32, slices_per_axis=40)
    data.setup()
    return data


@pytest.fixture
def marked(monkeypatch):
    """Return a function that makes BrainSlices use another T1 volume."""

    def install(t1):
        volume = load_template().copy()
        volume[0] = t1
        monkeypatch.setattr(brain, "load_template", lambda: volume)
        return volume

    return install


def test_template_is_a_symmetric_brain():
    volume = load_template()
    assert volume.shape == (3, 192, 192, 192)
    assert 0.5e6 < (volume[1] > 127).sum() < 1.5e6  # about a litre of grey matter, in mm^3
    first, last = extent(volume, 0)
    inner = volume[:, first : last + 1]
    assert np.array_equal(inner, inner[:, ::-1])


def test_samples_have_the_documented_types_and_all_classes(slices):
    for stage in STAGES:
        samples = slices.samples(stage)
        image, mask = samples[len(samples) // 2]
        assert (image.shape, image.dtype) == ((1, 32, 32), torch.float32)
        assert (mask.shape, mask.dtype) == ((32, 32), torch.int64)
        assert 0 <= samples.images.min() < 0.01
        assert 0.5 < samples.images.max() <= 1
        assert samples.masks.unique().tolist() == [0, 1, 2]


def test_white_matter_is_brighter_than_grey_than_the_rest(slices):
    """The labels fit the images: checked by the contrast of T1."""
    samples = slices.samples("test")
    other, grey, white = (samples.images[:, 0][samples.masks == c].mean().item() for c in range(3))
    assert other + 0.3 < grey
    assert grey + 0.05 < white


def test_voxels_are_at_the_places_of_the_template(slices):
    """At 192 pixels a whole axial slice equals the slice of the volume, rotated."""
    data = BrainSlices(size=192, axes=["axial"], slices_per_axis=20)
    levels, volume = data.levels()[2], load_template()
    where = brain.positions(volume, 2, 20)
    expected = np.stack([np.rot90(volume[0, :, :, z]) for z in where if levels[z] == TEST])
    assert np.allclose(data.samples("test").images[:, 0].numpy(), expected / 255)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("axis", range(3))
def test_blocks_are_contiguous_with_a_gap(axis, seed):
    levels = BrainSlices(held_out=AXES, val=0.12, test=0.12, gap=4, seed=seed).levels()[axis]
    if axis == 0:
        first, last = extent(load_template(), 0)
        assert np.array_equal(levels[first : last + 1], levels[first : last + 1][::-1])
        levels = levels[: (first + last) // 2 + 1]
    coordinates = {level: np.flatnonzero(levels == level) for level in (TRAIN, VAL, TEST)}
    for level in (VAL, TEST):
        assert len(coordinates[level]) == coordinates[level][-1] - coordinates[level][0] + 1 > 5
    for a, b in ((TRAIN, VAL), (TRAIN, TEST), (VAL, TEST)):
        distance = np.abs(coordinates[a][:, None] - coordinates[b]).min()
        assert distance > 4


@pytest.mark.parametrize("axis", range(3))
def test_the_slices_of_two_sets_are_separated_by_the_gap(marked, axis):
    """The T1 is replaced by the coordinate, so that the pixels of a slice give its position."""
    marked(np.moveaxis(np.broadcast_to(np.arange(192), (192, 192, 192)), 2, axis))
    data = BrainSlices(size=32, axes=[AXES[axis]], slices_per_axis=60, gap=5)
    where = {stage: (data.samples(stage).images.mean((1, 2, 3)) * 255).round() for stage in STAGES}
    assert sum(len(set(places.tolist())) for places in where.values()) > 40
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert (where[a][:, None] - where[b]).abs().min() > 5


@pytest.mark.parametrize("held_out", [None, ["coronal"], AXES])
@pytest.mark.parametrize(("hidden", "stage"), [("test", "train"), ("test", "val"), ("val", "train")])
def test_no_voxel_of_one_set_is_visible_in_another(marked, held_out, hidden, stage):
    """Only voxels on slices of one set are bright: the other set must be dark, except with ``blank=False``."""
    shares = {"held_out": held_out, "val": 0.1, "test": 0.1, "size": 192, "slices_per_axis": 30}
    data = BrainSlices(**shares)
    lit = np.zeros((192, 192, 192), dtype=np.uint8)
    for axis, levels in enumerate(data.levels()):
        np.moveaxis(lit, axis, 0)[levels == brain.LEVELS[hidden]] = 255
    marked(lit)
    assert data.samples(hidden).images.max() == 1
    assert data.samples(stage).images.max() == 0
    crosses = (
        stage == "train" or held_out is AXES
    )  # val slices along one axis are parallel to the test slices
    assert BrainSlices(**shares, blank=False).samples(stage).images.max() == crosses


def test_only_the_held_out_axis_has_val_and_test_slices():
    data = BrainSlices(size=32, slices_per_axis=40, held_out=["coronal"])
    levels = data.levels()
    assert [set(axis) for axis in levels] == [{TRAIN}, {0, 1, 2, 3, 4}, {TRAIN}]
    chosen = levels[1][brain.positions(load_template(), 1, 40)]
    assert [len(data.samples(s)) for s in ("val", "test")] == [(chosen == VAL).sum(), (chosen == TEST).sum()]
    assert len(data.samples("train")) == 40 + 40 + (chosen == TRAIN).sum()
    with pytest.raises(ValueError, match=r"held_out=\['coronal'\]: choose from \['axial'\]"):
        BrainSlices(axes=["axial"], held_out=["coronal"])


def test_blanked_voxels_are_class_other(slices):
    """Blanked pixels have no tissue in the mask."""
    train, whole = (
        slices.samples("train"),
        BrainSlices(size=32, slices_per_axis=40, blank=False).samples("train"),
    )
    blanked = (train.images[:, 0] == 0) & (whole.images[:, 0] > 0.1)
    assert blanked.float().mean() > 0.05
    assert (train.masks[blanked] == 0).all()
    assert (whole.masks[blanked] > 0).float().mean() > 0.5


def test_test_slices_are_whole(slices):
    whole = BrainSlices(size=32, slices_per_axis=40, blank=False)
    assert torch.equal(slices.samples("test").images, whole.samples("test").images)


def test_one_axis_alone_blanks_nothing():
    one, whole = (BrainSlices(size=32, axes=["axial"], slices_per_axis=30, blank=b) for b in (True, False))
    assert torch.equal(one.samples("train").images, whole.samples("train").images)


def test_no_slice_is_the_mirror_image_of_one_in_another_set():
    data = BrainSlices(size=48, axes=["sagittal"], slices_per_axis=60, blank=False)
    flat = {stage: data.samples(stage).images.flatten(1) for stage in STAGES}
    for a, b in (("train", "test"), ("train", "val"), ("val", "test")):
        assert torch.cdist(flat[a], flat[b]).min() > 0.5


def test_a_seed_gives_the_same_slices_and_another_seed_other_blocks(slices):
    again, other = (BrainSlices(size=32, slices_per_axis=40, seed=seed) for seed in (0, 1))
    assert torch.equal(again.samples("train").images, slices.samples("train").images)
    assert any((a != b).any() for a, b in zip(again.levels(), other.levels(), strict=True))


def test_the_number_of_slices(slices):
    assert sum(len(slices.samples(stage)) for stage in STAGES) <= 3 * 40
    assert len(slices.samples("train")) > len(slices.samples("test")) > 3
    with pytest.raises(ValueError, match="slices_per_axis=500: sagittal has 1 to"):
        BrainSlices(slices_per_axis=500).setup()


def test_the_error_of_an_empty_set_says_how_to_fill_it():
    data = BrainSlices(size=32, slices_per_axis=20, val=0.0)
    assert len(data.samples("train"))
    with pytest.raises(ValueError, match=r"no samples for 'val' .*'val': 0.*raise val or slices_per_axis"):
        data.val_dataloader()
    with pytest.raises(ValueError, match=r"leave .* for training"):
        BrainSlices(val=0.5, test=0.45).setup()


def test_an_unknown_axis_and_missing_nilearn_raise(monkeypatch):
    with pytest.raises(ValueError, match="choose from"):
        BrainSlices(axes=["oblique"])
    monkeypatch.setattr(template, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install lightning-prune\[demo\]"):
        template.template_folder()


def test_only_training_is_augmented():
    def invert(image, mask):
        return tv_tensors.Image(1 - image), mask

    data = BrainSlices(size=32, slices_per_axis=20, transform=invert)
    for stage, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        assert torch.equal(torch.cat([image for image, _ in loader]), data.samples(stage).images)
    train = torch.cat([image for image, _ in data.train_dataloader()])
    assert train.min() < 0.5 < train.max()
    assert train.median() == 1  # the black background became white


def test_the_order_of_training_depends_on_the_seed_alone():
    def first_batch(seed, global_seed):
        torch.manual_seed(global_seed)
        data = BrainSlices(size=32, slices_per_axis=20, transform=v2.Identity(), seed=seed)
        data._sets = {"train": slices_of_seed_0}
        return next(iter(data.train_dataloader()))[0]

    slices_of_seed_0 = BrainSlices(size=32, slices_per_axis=20).samples("train")
    assert torch.equal(first_batch(0, 1), first_batch(0, 2))
    assert not torch.equal(first_batch(0, 1), first_batch(1, 1))


def test_workers_augment_differently_from_each_other_and_the_same_in_every_run():
    image, mask = BrainSlices(size=32, slices_per_axis=20).samples("train")[10]

    def epoch(seed):
        data = BrainSlices(num_workers=2, batch_size=1, seed=seed)
        data._sets = {"train": [(image, mask)] * 4}
        return [batch for batch, _ in data.train_dataloader()]

    one, again, other = epoch(0), epoch(0), epoch(1)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert all(not torch.equal(a, b) for i, a in enumerate(one) for b in one[:i])
    assert not torch.equal(one[0], other[0])


def test_a_short_training_lowers_the_loss_and_raises_the_miou():
    L.seed_everything(0)
    data = BrainSlices(size=32, slices_per_axis=40, transform=v2.Identity())
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 1)),
    )
    adam = partial(torch.optim.Adam, lr=1e-2)
    module = SegmentationModule(net, 3, optimizer=adam, class_names=data.class_names)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=6, enable_model_summary=False, **quiet)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.test(module, data, verbose=False)
    assert trainer.callback_metrics["test/loss"] < 0.5 * before["val/loss"]
    assert after["test/miou"] > before["val/miou"] + 0.2
    assert {"test/iou_other", "test/iou_grey", "test/iou_white"} < set(after)
