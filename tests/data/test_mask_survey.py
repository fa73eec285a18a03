"""Masks as people have them: what their numbers and colours mean is found out, or asked for by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_prune.data import FolderDataModule

RNG = np.random.default_rng(0)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def classes(n: int, seed: int) -> np.ndarray:
    """Return blocks of class numbers (16, 24): every class in every mask."""
    blocks = np.random.default_rng(seed).permutation(np.arange(24) % n).reshape(4, 6)
    return np.kron(blocks, np.ones((4, 4), dtype=int)).astype(np.uint8)


def folder(root, write, n: int, count: int = 6):
    """Write images and masks; ``write(class numbers, path)`` saves a mask."""
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for i in range(count):
        Image.fromarray(RNG.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        write(classes(n, i), root / "masks" / f"{i}.png")
    return root


def saved(array, path, **options):
    Image.fromarray(array).save(path, **options)


def loaded(root, n: int, **options):
    """Return the data module after it has looked at the masks, and whether each mask is the class numbers written."""
    data = FolderDataModule(root, n, val=0.2, test=0.2, **options)
    for stage in ("train", "val", "test"):
        samples = data.samples(stage)
        for index, pair in enumerate(samples.pairs):
            expected = torch.from_numpy(classes(n, int(pair.image.stem)).astype(np.int64))
            assert torch.equal(samples[index][1], expected), pair.mask
    return data


def lut(*levels):
    return lambda mask, path: saved(np.array(levels, dtype=np.uint8)[mask], path)


def test_class_numbers_are_read_without_a_word(tmp_path, capsys):
    assert loaded(folder(tmp_path, saved, 3), 3).mask_text == ""
    assert capsys.readouterr().out == ""


def test_zero_and_255_are_two_classes_and_one_line_says_so(tmp_path, capsys):
    loaded(folder(tmp_path, lut(0, 255), 2), 2)
    assert capsys.readouterr().out == "masks: 0 and 255 are read as classes 0 and 1\n"


def test_the_line_comes_once_for_each_data_set_of_a_process(tmp_path, capsys):
    """Each run of a sweep loads its data anew."""
    roots = [tmp_path / name for name in ("a", "b")]
    for root in roots:
        root.mkdir()
        folder(root, lut(0, 255), 2)
    for root in [*roots, *roots]:
        assert loaded(root, 2).mask_text == "0 and 255 are read as classes 0 and 1"
    assert capsys.readouterr().out == 2 * "masks: 0 and 255 are read as classes 0 and 1\n"


def test_jpeg_masks_are_read_at_their_middle(tmp_path):
    def write(mask, path):
        saved(mask * np.uint8(255), path.with_suffix(".jpg"), quality=80)

    data = loaded(folder(tmp_path, write, 2), 2)
    assert "128 and more are read as class 1" in data.mask_text


@pytest.mark.parametrize(
    ("levels", "text"),
    [((1, 2, 3), "1 to 3 are read"), ((0, 127, 255), "0, 127, 255 are read"), ((0, 128, 255), "0, 128, 255")],
)
def test_other_numberings_of_three_classes(tmp_path, levels, text):
    assert text in loaded(folder(tmp_path, lut(*levels), 3), 3).mask_text


def indexed(palette):
    def write(mask, path):
        image = Image.fromarray(mask).convert("P")
        image.putdata(mask.flatten().tolist())
        image.putpalette(np.array(palette, dtype=np.uint8).flatten().tolist())
        image.save(path)

    return write


def test_indices_of_palette_images_are_class_numbers_and_one_line_says_so(tmp_path, capsys):
    loaded(folder(tmp_path, indexed([(0, 0, 0), RED, GREEN]), 3), 3)
    assert capsys.readouterr().out == "masks: indices of the palette are class numbers\n"


def test_palettes_that_differ_between_files_are_read_by_colour(tmp_path):
    """A program that reduces colours orders the palette by frequency: indices mean nothing, colours do."""

    def write(mask, path):
        order = [0, 1] if int(path.stem) % 2 else [1, 0]
        palette = [[(0, 0, 0), BLUE][n] for n in order]
        indexed(palette)(np.array(order, dtype=np.uint8)[mask], path)

    data = loaded(folder(tmp_path, write, 2), 2)
    assert data.mask_text == "black and #0000ff are classes 0 and 1"


def coloured(*colours):
    return lambda mask, path: saved(np.array(colours, dtype=np.uint8)[mask], path)


def test_colours_of_pascal_voc_are_known(tmp_path):
    data = loaded(folder(tmp_path, coloured((0, 0, 0), (128, 0, 0), (0, 128, 0)), 3), 3)
    assert "PASCAL VOC" in data.mask_text


def test_white_on_black_in_rgb_and_rgba_needs_no_palette(tmp_path):
    loaded(folder(tmp_path, coloured((0, 0, 0, 255), (255, 255, 255, 255)), 2), 2)


def test_the_error_of_other_colours_is_a_palette_to_copy(tmp_path):
    root = folder(tmp_path, coloured(BLUE, RED, GREEN), 3)
    with pytest.raises(ValueError, match=r'palette={"#0000ff": 0, "#00ff00": 1, "#ff0000": 2}'):
        FolderDataModule(root, 3).setup()
    loaded(root, 3, palette={"#0000ff": 0, "ff0000": 1, "lime": 2})
    loaded(root, 3, palette=["blue", [255, 0, 0], "lime"])


def test_a_palette_of_numbers_changes_these_only(tmp_path):
    root = folder(tmp_path, lut(0, 200, 2), 3)
    loaded(root, 3, palette={200: 1})
    with pytest.raises(ValueError, match="mixes colours and numbers"):
        FolderDataModule(root, 3, palette={200: 1, "red": 2}).setup()


def test_255_among_class_numbers_is_asked_for_and_kept_as_ignored(tmp_path):
    root = folder(tmp_path, lut(0, 1, 255), 3)
    with pytest.raises(ValueError, match=r"has class number 255.*ignore_index=255.*palette=\{255: 2\}"):
        FolderDataModule(root, 3).setup()
    data = FolderDataModule(root, 2, ignore_index=255)
    assert sorted(data.samples("train")[0][1].unique().tolist()) == [0, 1, 255]
    loaded(root, 3, palette={255: 2})


def test_more_classes_than_the_network_is_an_error_at_the_start_that_names_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"masks/\d.png has class number 4, but num_classes=3 allows 0 to 2"):
        FolderDataModule(folder(tmp_path, saved, 5), 3).setup()


def test_photographs_as_masks_are_an_error(tmp_path):
    def write(mask, path):
        saved(RNG.integers(0, 256, (16, 24), dtype=np.uint8), path)

    with pytest.raises(ValueError, match="so many values are no classes"):
        FolderDataModule(folder(tmp_path, write, 3), 3).setup()


def test_a_value_that_was_not_seen_first_is_an_error_that_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_prune.data.mask_survey.MAX_FILES", 2)
    root = folder(tmp_path, lut(1, 2, 3), 3)
    saved(np.full((16, 24), 9, dtype=np.uint8), root / "masks" / "3.png")
    data = FolderDataModule(root, 3, val=0, test=0)
    data.setup()
    with pytest.raises(ValueError, match=r"masks/3.png has the value 9"):
        list(data.samples("train"))


def test_more_colours_than_classes_are_counted(tmp_path):
    root = folder(tmp_path, coloured(BLUE, RED, GREEN), 3)
    with pytest.raises(ValueError, match=r"3 colours \(1 more than num_classes=2\).*'data.palette=\[\"#"):
        FolderDataModule(root, 2).setup()
