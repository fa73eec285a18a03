"""FashionScenes and FashionMNIST: files, splits, masks, seeds and errors."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from lightning_prune.data import FashionMNIST, FashionScenes, fashion, fashion_files, scenes
from lightning_prune.data.fashion_files import DEBIAN, Items, find_files, load_items
from lightning_prune.data.scenes import CLASS_OF_ITEM, SceneMaker
from tests.support.idx_files import idx_bytes, write_fashion

COUNTS = {"train": 120, "test": 40}
SMALL = {"train": 300, "val": 300, "test": 300}
STAGES = ("train", "val", "test")
needs_debian = pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")


@pytest.fixture
def root(tmp_path):
    """Folder of torchvision with training items of grey value 200 and test items of 100."""
    write_fashion(tmp_path / "FashionMNIST" / "raw", COUNTS, {"train": 200, "test": 100})
    return tmp_path


@pytest.fixture(autouse=True)
def _nothing_remembered():
    """Read every test's own files."""
    fashion._scenes.cache_clear()
    fashion_files._read.cache_clear()


def squares(values, labels=None):
    """Return items, one per value, each a square of one grey value."""
    images = torch.zeros(len(values), 28, 28, dtype=torch.uint8)
    images[:, 4:24, 7:21] = torch.tensor(values, dtype=torch.uint8)[:, None, None]
    labels = torch.arange(len(values)) % 10 if labels is None else torch.tensor(labels)
    return Items(images, labels.byte())


def test_scenes_have_the_documented_types(root):
    data = FashionScenes(root, train=20, val=5, test=6)
    for stage, count in (("train", 20), ("val", 5), ("test", 6)):
        samples = data.samples(stage)
        assert len(samples) == count
        image, mask = samples[count - 1]
        assert (image.shape, image.dtype) == ((1, 48, 48), torch.float32)
        assert (mask.shape, mask.dtype) == ((48, 48), torch.int64)
        assert 0 <= image.min() < image.max() <= 1


def test_each_set_of_scenes_shows_its_own_items_only(monkeypatch):
    """Items of a set have one size of their own, which the area of the masks shows."""
    heights = {"train": 20, "val": 12, "test": 6}

    def items(root, validation):
        parts = {}
        for stage, height in heights.items():
            parts[stage] = squares([255] * 10)
            parts[stage].images[:, height:] = 0
        return parts

    monkeypatch.setattr(fashion, "split_items", items)
    data = FashionScenes(items=1, noise=0, **SMALL)
    largest = {stage: (data.samples(stage).masks > 0).sum((1, 2)).max().item() for stage in STAGES}
    rows = {"train": 16, "val": 8, "test": 2}  # of the square, which begins in row 4
    for stage in STAGES:
        assert 0 < largest[stage] <= 14 * rows[stage] * 1.1**2 * 1.3


def test_items_are_split_by_their_place_in_the_files_whatever_the_seed(root):
    parts = fashion.split_items(root, 1 / 6)
    assert [len(parts[stage].labels) for stage in STAGES] == [100, 20, 40]
    whole = load_items(root)
    assert torch.equal(torch.cat([parts["train"].labels, parts["val"].labels]), whole["train"].labels)
    assert parts["test"] is whole["test"]
    assert parts["train"].images.max() == parts["val"].images.max() == 200
    assert parts["test"].images.max() == 100


def test_fewer_scenes_are_the_first_of_more_and_seeds_differ(root):
    few, more = (FashionScenes(root, train=n, val=0, test=0).samples("train") for n in (30, 600))
    assert torch.equal(few.images, more.images[:30])
    assert torch.equal(few.masks, more.masks[:30])
    other = FashionScenes(root, train=30, val=0, test=0, seed=1).samples("train")
    assert (other.images != few.images).float().mean() > 0.9
    assert not torch.equal(more.masks[:256], more.masks[256:512])


def test_scenes_do_not_depend_on_random_numbers_drawn_before_nor_on_workers(root):
    options = {"train": 40, "val": 20, "test": 4, "batch_size": 8}
    batches = []
    for seed, workers in ((1, 0), (2, 2)):
        fashion._scenes.cache_clear()
        torch.manual_seed(seed)
        data = FashionScenes(root, num_workers=workers, **options)
        batches.append([*data.train_dataloader(), *data.val_dataloader()])
    for first, second in zip(*batches, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_later_items_hide_earlier_ones_in_image_and_mask(monkeypatch):
    """Each item covers the whole scene: only the last one is left."""
    monkeypatch.setattr(SceneMaker, "_motions", lambda self, n, g: torch.eye(2, 3).repeat(n, 1, 1))
    shades = [20, 60, 100, 140, 180, 200, 210, 220, 230, 240]
    items = Items(torch.tensor(shades).byte()[:, None, None].expand(10, 28, 28), torch.arange(10).byte())
    placed = []
    original = SceneMaker._placed

    def keep(self, images, generator):
        placed.append((images, original(self, images, generator)))
        return placed[-1][1]

    monkeypatch.setattr(SceneMaker, "_placed", keep)
    made = SceneMaker(noise=0.0).make(items, scenes.CHUNK, (0,))
    images, (pixels, _) = placed[0]
    number = {shade: int(CLASS_OF_ITEM[n]) for n, shade in enumerate(shades)}
    expected = torch.tensor([number[int(image[0, 0])] for image in images[:, -1]])
    inner = slice(2, -2)  # the border of an item is half transparent
    assert (made.masks[:, inner, inner] == expected[:, None, None]).all()
    assert torch.equal(made.images[:, 24, 24], (255 * pixels[:, -1, 24, 24]).round().byte())


def test_one_class_per_item_in_equal_shares_and_the_mask_is_where_the_item_is():
    """Without noise, items are brighter than 255 * 0.4 and the background is dark."""
    items = squares([255] * 60)
    maker = SceneMaker(per_scene=1, noise=0.0)
    dark = torch.zeros(scenes.CHUNK, 48, 48)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SceneMaker, "_background", lambda self, generator: dark)
        made = maker.make(items, 2048, (3,))
    present = [{*mask.unique().tolist()} - {0} for mask in made.masks]
    assert {len(classes) for classes in present} == {1}
    counts = np.bincount([classes.pop() for classes in present], minlength=6)[1:]
    assert counts.min() > 2048 / 5 * 0.85
    assert ((made.images > 50) == (made.masks > 0)).float().mean() > 0.99
    assert (made.images[made.masks == 0]).max() < 255 * 0.51  # less than half of a border pixel


def test_items_are_centred_inside_the_scene():
    made = SceneMaker(per_scene=1, noise=0.0).make(squares([255] * 10), 1024, (0,))
    rows, columns = (made.masks > 0).nonzero()[:, 1:].float().mean(0)
    assert rows.item() == pytest.approx(23.5, abs=1)
    assert columns.item() == pytest.approx(23.5, abs=1)
    assert (made.masks > 0).any(0).float().mean() > 0.9  # they lie anywhere


def test_holes_of_an_item_belong_to_it():
    items = squares([255] * 10)
    items.images[:, 10, 12] = 0
    silhouettes = scenes._silhouettes(items.images[:, None].float())
    expected = torch.zeros(28, 28)
    expected[4:24, 7:21] = 1
    assert torch.equal(silhouettes[0, 0], expected)


def test_another_size_shows_the_same_scene_at_another_resolution():
    items = squares([255] * 10)
    small, large = (SceneMaker(size, 1, 0.0).make(items, 64, (5,)) for size in (48, 96))
    shrunk = interpolate((large.masks > 0)[:, None].float(), scale_factor=0.5, mode="area")[:, 0] > 0.5
    assert (shrunk == (small.masks > 0)).float().mean() > 0.98


def test_the_batches_of_the_loaders(root):
    data = FashionScenes(root, train=70, val=10, test=10, distance_maps=True)
    shapes = [tuple(t.shape) for t in next(iter(data.train_dataloader()))]
    assert shapes == [(32, 1, 48, 48), (32, 48, 48), (32, 6, 48, 48)]
    assert len(data.train_dataloader()) == 2


def test_images_for_classification_are_normalised_and_padded(root):
    plain, padded = (FashionMNIST(root, size=size).samples("test") for size in (28, 33))
    image, label = plain[3]
    assert (image.shape, image.dtype, int(label)) == ((1, 28, 28), torch.float32, 3)
    assert image[0, 12, 12].item() == pytest.approx((100 / 255 - 0.2860) / 0.3530, abs=1e-5)
    black = -0.2860 / 0.3530
    assert image[0, 0, 0].item() == pytest.approx(black, abs=1e-5)
    larger = padded[3][0]
    assert larger.shape == (1, 33, 33)
    assert torch.equal(larger[:, 2:30, 2:30], image)
    assert larger[0, -1].unique().tolist() == pytest.approx([black], abs=1e-5)


def test_the_sets_for_classification_are_disjoint_and_complete(root):
    data = FashionMNIST(root, val=0.25)
    assert [len(data.samples(stage)) for stage in STAGES] == [90, 30, 40]
    labels = torch.cat([data.samples("train").labels, data.samples("val").labels])
    assert torch.equal(labels, load_items(root)["train"].labels.long())
    assert data.samples("test").images.max() == 100
    image, label = next(iter(data.train_dataloader()))
    assert (image.shape, label.shape, label.dtype) == ((90, 1, 28, 28), (90,), torch.int64)


def test_files_are_found_in_all_layouts(root, tmp_path, monkeypatch):
    folder = root / "FashionMNIST" / "raw"
    assert find_files(root) == find_files(folder)
    assert find_files(root)["test"][1] == folder / "t10k-labels-idx1-ubyte.gz"
    plain = write_fashion(tmp_path / "plain", COUNTS, {"train": 200, "test": 100}, compressed=False)
    assert find_files(plain)["train"][0] == plain / "train-images-idx3-ubyte"
    for stage in ("train", "test"):
        assert torch.equal(load_items(plain)[stage].images, load_items(root)[stage].images)
    (root / "work").mkdir()
    monkeypatch.chdir(root / "work")
    (root / "work" / "data").symlink_to(root)
    assert find_files()["train"][0].parent.resolve() == folder


def test_missing_files_are_named_with_the_remedy(root, tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_files, "DEBIAN", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    remedy = r"apt-get install dataset-fashion-mnist.*FashionMNIST\(root, download=True\)"
    with pytest.raises(FileNotFoundError, match=f"data, .*nowhere: .*{remedy}"):
        FashionScenes().samples("train")
    (root / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=remedy):
        FashionMNIST(root).samples("train")


def test_damaged_files_are_named(root):
    folder = root / "FashionMNIST" / "raw"
    path = folder / "train-images-idx3-ubyte.gz"
    whole = gzip.decompress(path.read_bytes())
    damaged = {
        "is truncated or damaged": path.read_bytes()[:-20],
        "truncated or damaged": b"no gzip",
        "has 94000 values instead of 94080": gzip.compress(whole[:-80]),
        "is no idx file": gzip.compress(b"\0\0\x0d\3" + whole[4:]),
        r"have shapes \(120, 28, 27\)": gzip.compress(idx_bytes(np.zeros((120, 28, 27), np.uint8))),
        r"have shapes \(3, 28, 28\)": gzip.compress(idx_bytes(np.zeros((3, 28, 28), np.uint8))),
    }
    for message, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"train-images.*{message}"):
            FashionMNIST(root).samples("train")
    path.write_bytes(gzip.compress(whole))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.full(120, 10, np.uint8))))
    with pytest.raises(ValueError, match="class number 10"):
        FashionScenes(root).samples("train")


def test_wrong_arguments_are_named(root):
    with pytest.raises(ValueError, match="size=0"):
        FashionScenes(root, size=0)
    with pytest.raises(ValueError, match="size=20"):
        FashionMNIST(root, size=20)
    with pytest.raises(ValueError, match=r"val=1\.5"):
        FashionMNIST(root, val=1.5).setup()
    with pytest.raises(ValueError, match=r"no samples for 'val' .*raise val"):
        FashionScenes(root, train=10, val=0, test=0).val_dataloader()
    with pytest.raises(ValueError, match=r"no items of \['tops', 'trousers'"):
        SceneMaker().make(squares([200] * 4, [9, 9, 8, 8]), 4, (0,))


@needs_debian
def test_the_files_of_debian_are_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    items = load_items()
    assert {stage: len(part.labels) for stage, part in items.items()} == {"train": 60000, "test": 10000}
    assert items["train"].labels.bincount().tolist() == [6000] * 10
    data = FashionMNIST()
    image, label = data.samples("test")[0]
    assert (image.shape, int(label)) == ((1, 28, 28), 9)
    sample = torch.stack([data.samples("train")[n][0] for n in range(2000)])
    assert sample.mean().abs() < 0.05
    assert sample.std().item() == pytest.approx(1, abs=0.05)


@needs_debian
def test_no_image_of_the_test_split_is_a_training_image(monkeypatch, tmp_path):
    """No two of the three sets of items share an image, except the few that Fashion-MNIST itself has twice."""
    monkeypatch.chdir(tmp_path)
    parts = fashion.split_items(None, 1 / 6)
    hashes = {stage: {image.numpy().tobytes() for image in part.images} for stage, part in parts.items()}
    assert len(hashes["train"] & hashes["test"]) <= 10
    assert len(hashes["train"] & hashes["val"]) <= 50


@needs_debian
def test_real_scenes_have_all_classes_and_mostly_background(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    masks = FashionScenes(train=256, val=0, test=256).samples("test").masks
    shares = torch.bincount(masks.flatten().long(), minlength=6) / masks.numel()
    assert 0.55 < shares[0] < 0.75
    assert shares[1:].min() > 0.04
