"""Warnings of very few samples, and of the same image in two stages."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from lightning_prune.data import FolderDataModule

RNG = np.random.default_rng(0)


def pairs(root, names, size=(8, 8)):
    for kind, top in (("images", 256), ("masks", 2)):
        (root / kind).mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.fromarray(RNG.integers(0, top, size, dtype=np.uint8)).save(root / kind / f"{name}.png")


def test_three_pairs_warn_and_four_do_not(tmp_path):
    pairs(tmp_path, "abc")
    with pytest.warns(UserWarning, match="only 3 pairs of image and mask"):
        FolderDataModule(tmp_path, 2, channels=1).setup()
    pairs(tmp_path, "d")
    FolderDataModule(tmp_path, 2, channels=1).setup()


def test_a_copy_under_another_name_warns(tmp_path):
    pairs(tmp_path / "train", "abcd")
    pairs(tmp_path / "test", "ef")
    shutil.copy(tmp_path / "train/images/b.png", tmp_path / "test/images/e.png")
    with pytest.warns(
        UserWarning, match=r"train and test have the same images once, such as .*b.png and .*e.png"
    ):
        FolderDataModule(tmp_path, 2, channels=1, val=0).setup()


def test_copies_within_one_folder_that_is_split_warn(tmp_path):
    pairs(tmp_path, "abcdefgh")
    for name in "bcdefgh":
        shutil.copy(tmp_path / "images/a.png", tmp_path / f"images/{name}.png")
    with pytest.warns(UserWarning, match="the same images") as caught:
        FolderDataModule(tmp_path, 2, channels=1, val=0.25, test=0.25).setup()
    assert len(caught) == 3  # train and val, train and test, val and test


def test_the_same_name_with_another_content_warns_and_says_so(tmp_path):
    pairs(tmp_path / "train", "abcd")
    pairs(tmp_path / "test", "cd")
    with pytest.warns(
        UserWarning, match=r"train and test have images of the same name 2 times.*contents differ"
    ):
        FolderDataModule(tmp_path, 2, channels=1, val=0).setup()


def test_images_of_equal_size_in_bytes_and_other_names_do_not_warn(tmp_path):
    for stage, names in {"train": "abcd", "val": "ef", "test": "gh"}.items():
        for kind, top in (("images", 256), ("masks", 2)):
            (tmp_path / stage / kind).mkdir(parents=True)
            for name in names:
                array = RNG.integers(0, top, (8, 8), dtype=np.uint8)
                Image.fromarray(array).save(tmp_path / stage / kind / f"{name}.bmp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FolderDataModule(tmp_path, 2, channels=1).setup()
