"""FashionScenes and FashionMNIST: files, splits, masks, seeds and errors."""

from __future__ import annotations

import pytest
import torch

from lightning_prune.data import FashionMNIST, FashionScenes, fashion_files
from lightning_prune.data.fashion_files import DEBIAN
from tests.support.idx_files import write_fashion

COUNTS = {"train": 120, "test": 40}


@pytest.fixture
def root(tmp_path):
    """Folder of torchvision with training items of grey value 200 and test items of 100."""
    write_fashion(tmp_path / "FashionMNIST" / "raw", COUNTS, {"train": 200, "test": 100})
    return tmp_path


def test_scenes_have_the_documented_types(root):
    data = FashionScenes(root, train=20, val=5, test=6)
    for stage, count in (("train", 20), ("val", 5), ("test", 6)):
        samples = data.samples(stage)
        assert len(samples) == count
        image, mask = samples[count - 1]
        assert (image.shape, image.dtype) == ((1, 48, 48), torch.float32)
        assert (mask.shape, mask.dtype) == ((48, 48), torch.int64)
        assert 0 <= image.min() < image.max() <= 1


def test_fewer_scenes_are_the_first_of_more_and_seeds_differ(root):
    few, more = (FashionScenes(root, train=n).samples("train") for n in (30, 600))
    assert torch.equal(few.images, more.images[:30])
    assert torch.equal(few.masks, more.masks[:30])
    other = FashionScenes(root, train=30, seed=1).samples("train")
    assert (other.images != few.images).float().mean() > 0.9


def test_missing_files_are_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist.*download=True"):
        FashionScenes(tmp_path).samples("train")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="no dataset-fashion-mnist")
def test_the_files_of_debian_are_found():
    items = fashion_files.load_items()
    assert {stage: len(part.labels) for stage, part in items.items()} == {"train": 60000, "test": 10000}
    assert items["train"].labels.bincount().tolist() == [6000] * 10
    image, label = FashionMNIST().samples("test")[0]
    assert (image.shape, int(label)) == ((1, 28, 28), 9)
