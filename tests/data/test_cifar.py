"""CIFAR10: files, splits, normalisation and errors."""

from __future__ import annotations

import pickle

import pytest
import torch
from torchvision.transforms import v2

from lightning_prune.data import CIFAR10, crop_and_flip
from lightning_prune.data.base import Augmented
from tests.support.cifar_files import write_cifar


@pytest.fixture
def root(tmp_path):
    return write_cifar(tmp_path)


def numbers(samples):
    """Return the number that the first pixel of each image holds."""
    return set(samples.images[:, 0, 0, 0].tolist())


def test_the_sets_are_disjoint_and_complete(root):
    data = CIFAR10(root, val=0.2)
    train, val, test = (numbers(data.samples(stage)) for stage in ("train", "val", "test"))
    assert (train, val, test) == (set(range(80)), set(range(80, 100)), set(range(100, 120)))
    whole = CIFAR10(root, val=0)
    assert len(whole.samples("train")) == 100
    assert numbers(whole.samples("val")) == numbers(whole.samples("test")) == test


def test_images_are_normalised_as_torchvision_does(root):
    data = CIFAR10(root)
    image, label = data.samples("test")[7]
    raw = data.samples("test").images[7]
    expected = v2.Normalize(data.mean, data.std)(v2.functional.to_dtype(raw, torch.float32, scale=True))
    assert torch.allclose(image, expected, atol=1e-6)
    assert (int(label), label.dtype, label.shape) == (7, torch.int64, ())
    batch = next(iter(data.train_dataloader()))
    assert [(t.shape, t.dtype) for t in batch] == [((90, 3, 32, 32), torch.float32), ((90,), torch.int64)]


def test_the_crop_shifts_by_up_to_the_padding_and_fills_with_black():
    image = torch.arange(1.0, 17.0).view(1, 4, 4)
    augmented = Augmented([(image, torch.tensor(2))] * 400, crop_and_flip(4, padding=1, fill=[-5.0]))
    outputs = {tuple(augmented[n][0].flatten().tolist()) for n in range(400)}
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), value=-5.0)
    crops = [padded[:, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    assert outputs == {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(-1))}
    assert int(augmented[0][1]) == 2


def test_errors_name_file_and_remedy(root):
    with pytest.raises(FileNotFoundError, match=r"data_batch_1: give as root .* download=True"):
        CIFAR10(root / "elsewhere").samples("train")
    with pytest.raises(ValueError, match="val=1"):
        CIFAR10(root, val=1)
    file = root / "cifar-10-batches-py" / "data_batch_3"
    content = file.read_bytes()
    for damaged in (content[:5000], b"", pickle.dumps({b"data": 1}), pickle.dumps([1])):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"data_batch_3 is truncated or no batch"):
            CIFAR10(root).samples("train")


def test_a_pickle_runs_no_code(root, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps({b"data": Attack()}))
    with pytest.raises(ValueError, match=r"contains .*open"):
        CIFAR10(root).samples("test")
    assert not (tmp_path / "written").exists()
