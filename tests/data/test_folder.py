"""FolderDataModule: layouts, pairing, file formats, splits, augmentation and errors."""

from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_prune.data import FolderDataModule, augment, default_augmentation
from lightning_prune.data.image_files import find_pairs, read_image, read_mask

RED, GREEN, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 0)


def random_mask(seed=0, h=12, w=16, classes=3):
    return np.random.default_rng(seed).integers(0, classes, (h, w)).astype(np.uint8)


def save(file, array, mode=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file) if mode is None else paletted(array).save(file)
    return file


def paletted(array):
    image = Image.fromarray(array).convert("P")
    image.putdata(array.flatten().tolist())
    image.putpalette([*BLACK, *RED, *GREEN])
    return image


def colour(mask):
    return np.stack([mask * 80] * 3, -1).astype(np.uint8)


def dataset(root, n=10, images="images", masks="masks", suffix="", start=0):
    """Image i is 80 x its mask in every channel, so that both can be compared after a geometric transform."""
    for i in range(start, start + n):
        save(root / images / f"{i:02d}.png", colour(random_mask(i)))
        save(root / masks / f"{i:02d}{suffix}.png", random_mask(i))
    return root


def files(data, stage):
    return [pair.image.stem for pair in data.pairs().get(stage, [])]


def fits(image, mask):
    return torch.equal((image[0] * 255 / 80).round().long(), mask)


def test_samples_equal_the_written_files(tmp_path):
    data = FolderDataModule(dataset(tmp_path), 3)
    image, mask = data.samples("train")[0]
    i = int(files(data, "train")[0])
    assert (image.dtype, mask.dtype) == (torch.float32, torch.int64)
    assert np.array_equal(mask.numpy(), random_mask(i))
    assert np.allclose(image.numpy(), colour(random_mask(i)).transpose(2, 0, 1) / 255)


def test_split_by_shares_is_complete_and_disjoint_and_depends_on_the_seed(tmp_path):
    dataset(tmp_path, 20)
    data = FolderDataModule(tmp_path, 3, val=0.2, test=0.1)
    parts = [files(data, stage) for stage in ("train", "val", "test")]
    assert [len(part) for part in parts] == [14, 4, 2]
    assert sorted(chain.from_iterable(parts)) == [f"{i:02d}" for i in range(20)]
    assert files(FolderDataModule(tmp_path, 3, val=0.2, test=0.1), "val") == parts[1]
    assert files(FolderDataModule(tmp_path, 3, val=0.2, test=0.1, seed=1), "val") != parts[1]


@pytest.mark.parametrize("pattern", ["{stage}/{kind}", "{kind}/{stage}"])
def test_split_by_folders(tmp_path, pattern):
    for k, stage in enumerate(("train", "valid", "test")):
        names = {kind: pattern.format(stage=stage, kind=kind) for kind in ("images", "masks")}
        dataset(tmp_path, 2 + k, **names, start=10 * k)
    data = FolderDataModule(tmp_path, 3)
    assert files(data, "train") == ["00", "01"]
    assert files(data, "val") == ["10", "11", "12"]
    assert files(data, "test") == ["20", "21", "22", "23"]


def test_a_missing_val_folder_is_split_from_train_and_a_missing_test_folder_raises(tmp_path):
    dataset(tmp_path / "train", 10)
    data = FolderDataModule(tmp_path, 3, val=0.3)
    assert len(files(data, "train")) == 7
    assert len(files(data, "val")) == 3
    assert not set(files(data, "train")) & set(files(data, "val"))
    with pytest.raises(ValueError, match=r"no samples for 'test'.*test/images"):
        data.test_dataloader()


def test_shares_that_leave_nothing_for_training_raise(tmp_path):
    with pytest.raises(ValueError, match=r"2 images.*none for training"):
        FolderDataModule(dataset(tmp_path, 2), 3).setup()


def test_suffixes_and_subfolders_in_one_folder(tmp_path):
    for city in ("berlin", "bonn"):
        save(tmp_path / city / "1.jpg", colour(random_mask()))
        save(tmp_path / city / "1_mask.png", random_mask())
    pairs = find_pairs(tmp_path, tmp_path, mask_suffix="_mask")
    names = [(p.image.relative_to(tmp_path).as_posix(), p.mask.name) for p in pairs]
    assert names == [("berlin/1.jpg", "1_mask.png"), ("bonn/1.jpg", "1_mask.png")]
    with pytest.raises(ValueError, match="mask_suffix"):
        find_pairs(tmp_path, tmp_path)


def test_files_with_another_suffix_are_ignored(tmp_path):
    dataset(tmp_path, 2, suffix="_labels")
    save(tmp_path / "masks" / "00_colours.png", colour(random_mask()))
    pairs = find_pairs(tmp_path / "images", tmp_path / "masks", mask_suffix="_labels")
    assert [p.mask.name for p in pairs] == ["00_labels.png", "01_labels.png"]


@pytest.mark.parametrize(("extension", "tolerance"), [("png", 0), ("bmp", 0), ("tiff", 0), ("jpg", 0.15)])
def test_image_formats(tmp_path, extension, tolerance):
    smooth = np.add.outer(np.arange(16), np.arange(24)).astype(np.uint8) * 5
    pixels = np.stack([smooth, smooth + 20, 255 - smooth], -1)
    image = read_image(save(tmp_path / f"a.{extension}", pixels))
    assert torch.allclose(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255, atol=tolerance)
    assert read_image(tmp_path / f"a.{extension}", channels=1).shape == (1, 16, 24)


def test_deep_images(tmp_path):
    deep = np.array([[0, 65535], [32768, 1]], dtype=np.uint16)
    expected = torch.tensor([[0, 65535], [32768, 1]]) / 65535
    for extension in ("png", "tif"):
        image = read_image(save(tmp_path / f"deep.{extension}", deep), channels=3)
        assert image.shape == (3, 2, 2)
        assert torch.allclose(image[1], expected)
    floats = np.array([[-1.5, 2.5]], dtype=np.float32)
    assert read_image(save(tmp_path / "float.tif", floats), channels=1).tolist() == [[[-1.5, 2.5]]]
    with pytest.raises(ValueError, match="channels=4"):
        read_image(tmp_path / "deep.png", channels=4)


def test_mask_formats(tmp_path):
    mask = random_mask()
    expected = torch.from_numpy(mask.astype(np.int64))
    written = [
        save(tmp_path / "grey.png", mask),
        save(tmp_path / "grey.bmp", mask),
        save(tmp_path / "deep.png", mask.astype(np.uint16)),
        save(tmp_path / "deep.tif", mask.astype(np.int32)),
        save(tmp_path / "palette.png", mask, "P"),
        save(tmp_path / "grey_as_colour.png", np.stack([mask] * 3, -1)),
        save(tmp_path / "with_alpha.png", np.stack([mask, mask, mask, mask * 0 + 255], -1)),
    ]
    for file in written:
        assert torch.equal(read_mask(file), expected), file.name
    bits = save(tmp_path / "bits.png", mask > 1)
    with Image.open(bits) as opened:
        assert opened.mode == "1"
    assert torch.equal(read_mask(bits), (expected > 1).long())


@pytest.mark.parametrize("palette", [{BLACK: 0, RED: 1, GREEN: 2}, {"black": 0, "#ff0000": 1, "green": 2}])
def test_palette_maps_colours(tmp_path, palette):
    mask = random_mask()
    expected = torch.from_numpy(mask.astype(np.int64))
    colours = np.array([BLACK, RED, GREEN], dtype=np.uint8)[mask]
    assert torch.equal(read_mask(save(tmp_path / "rgb.png", colours), palette), expected)
    assert torch.equal(read_mask(save(tmp_path / "p.png", mask, "P"), palette), expected)


def test_two_colours_of_one_class_and_the_error_of_unknown_colours(tmp_path):
    file = save(tmp_path / "rgb.png", np.array([[BLACK, RED, GREEN]], dtype=np.uint8))
    assert read_mask(file, {BLACK: 255, RED: 1, GREEN: 1}).tolist() == [[255, 1, 1]]
    with pytest.raises(ValueError, match=r"rgb.png has 1 colours without class, #ff0000.*palette"):
        read_mask(file, {BLACK: 0, GREEN: 1})
    with pytest.raises(ValueError, match=r"rgb.png has colours: give palette"):
        read_mask(file)


def test_a_mask_of_fractions_raises(tmp_path):
    file = save(tmp_path / "float.tif", np.array([[0.5, 1.0]], dtype=np.float32))
    with pytest.raises(ValueError, match=r"float.tif has values of type float32"):
        read_mask(file)


@pytest.mark.filterwarnings("ignore:only 3 pairs", "ignore:.*have the same images")
def test_resize_keeps_the_classes_and_applies_to_both(tmp_path):
    mask = np.kron(np.array([[0, 2], [1, 0]], dtype=np.uint8), np.ones((8, 8), dtype=np.uint8))
    for i in range(3):
        save(tmp_path / "images" / f"{i}.png", colour(mask))
        save(tmp_path / "masks" / f"{i}.png", mask)
    image, small = FolderDataModule(tmp_path, 3, size=(4, 6)).samples("train")[0]
    assert image.shape == (3, 4, 6)
    assert small.tolist() == [[0, 0, 0, 2, 2, 2]] * 2 + [[1, 1, 1, 0, 0, 0]] * 2
    assert (image[0, 0, 0] < 0.1) & (image[0, 0, -1] > 0.55)
    with pytest.raises(ValueError, match="height, width"):
        FolderDataModule(tmp_path, 3, size=[4])


def test_image_and_mask_move_together(tmp_path):
    data = FolderDataModule(
        dataset(tmp_path), 3, transform=v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])
    )
    torch.manual_seed(0)
    moved = 0
    stored = {mask.numpy().tobytes() for _, mask in data.samples("train")}
    for images, masks in data.train_dataloader():
        for image, mask in zip(images, masks, strict=True):
            assert fits(image, mask)
            moved += mask.numpy().tobytes() not in stored
    assert moved > 0


def test_default_augmentation_moves_both_equally_and_fills_with_the_ignored_class():
    torch.manual_seed(0)
    mask = torch.zeros(64, 64, dtype=torch.int64)
    mask[8:40, 12:30] = 1
    overlaps, filled = [], 0
    for _ in range(20):
        image, moved = augment(default_augmentation(intensity=0.0, mask_fill=255), mask[None].float(), mask)
        assert set(moved.unique().tolist()) <= {0, 1, 255}
        bright, labelled = image[0] > 0.5, moved == 1
        overlaps.append(((bright & labelled).sum() / (bright | labelled).sum()).item())
        filled += (moved == 255).any().item()
    assert min(overlaps) > 0.95  # bilinear against nearest: only the edge may differ
    still = ((augment(v2.Identity(), mask[None].float(), mask)[1] == 1) & (moved == 1)).sum() / (
        mask == 1
    ).sum()
    assert still < 0.95
    assert filled > 10


def test_only_training_is_augmented(tmp_path):
    data = FolderDataModule(dataset(tmp_path), 3, transform=lambda image, mask: (image * 0, mask), val=0.3)
    assert all((images == 0).all() for images, _ in data.train_dataloader())
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert all(fits(image, mask) for batch in loader for image, mask in zip(*batch, strict=True))


def test_the_error_of_images_without_masks_counts_and_names_them(tmp_path):
    dataset(tmp_path, 9)
    for i in range(5):
        (tmp_path / "masks" / f"{i:02d}.png").unlink()
    with pytest.raises(ValueError, match=r"5 of 9 images .*: 00.png, 01.png, 02.png, \.\.\.;.*mask_suffix"):
        FolderDataModule(tmp_path, 3).setup()


def test_the_error_of_masks_without_images_counts_and_names_them(tmp_path):
    dataset(tmp_path, 4)
    (tmp_path / "images" / "03.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 masks .*: 03.png;"):
        FolderDataModule(tmp_path, 3).setup()


def test_two_images_of_one_name_raise(tmp_path):
    dataset(tmp_path, 2)
    save(tmp_path / "images" / "00.jpg", colour(random_mask()))
    with pytest.raises(ValueError, match=r"00.jpg and .*00.png have the same name"):
        FolderDataModule(tmp_path, 3).setup()


def test_a_missing_folder_and_a_folder_without_images_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*images"):
        FolderDataModule(tmp_path, 3).setup()
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "readme.txt").write_text("none here")
    with pytest.raises(FileNotFoundError, match="no images"):
        FolderDataModule(tmp_path, 3).setup()


def test_the_error_of_a_class_number_out_of_range_names_the_file(tmp_path):
    dataset(tmp_path, 4)
    for file in (tmp_path / "masks").iterdir():
        save(file, random_mask() + (random_mask() == 2) * np.uint8(253))
    with pytest.raises(
        ValueError, match=r"masks/\d+.png has class number 255, but num_classes=2 .*ignore_index"
    ):
        FolderDataModule(tmp_path, 2).samples("train")[0]
    _, mask = FolderDataModule(tmp_path, 2, ignore_index=255).samples("train")[0]
    assert mask.unique().tolist() == [0, 1, 255]


def test_image_and_mask_of_different_size_raise(tmp_path):
    dataset(tmp_path, 4)
    for file in (tmp_path / "masks").iterdir():
        save(file, random_mask(h=16, w=12))
    with pytest.raises(ValueError, match=r"\d+.png and .*\d+.png differ in size .*\(12, 16\) and \(16, 12\)"):
        FolderDataModule(tmp_path, 3, size=(8, 8)).samples("train")[0]


@pytest.mark.filterwarnings("ignore:only 3 pairs")
def test_the_error_of_a_batch_of_different_sizes_names_the_option(tmp_path):
    for i in range(3):
        save(tmp_path / "images" / f"{i}.png", colour(random_mask(h=8 + i)))
        save(tmp_path / "masks" / f"{i}.png", random_mask(h=8 + i))
    loader = FolderDataModule(tmp_path, 3, val=0, test=0, transform=v2.Identity()).train_dataloader()
    with pytest.raises(ValueError, match="set size="):
        next(iter(loader))


def test_workers_read_the_same_files(tmp_path):
    dataset(tmp_path, 6)
    without, with_workers = (FolderDataModule(tmp_path, 3, val=0.5, num_workers=n) for n in (0, 2))
    for (a, b), (c, d) in zip(without.val_dataloader(), with_workers.val_dataloader(), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_image_and_mask_side_by_side_as_the_guide_shows_it(tmp_path):
    for i in range(6):
        save(tmp_path / f"{i}.png", colour(random_mask(i)))
        save(tmp_path / f"{i}_mask.png", random_mask(i))
    data = FolderDataModule(tmp_path, 3, images=".", masks=".", mask_suffix="_mask")
    assert sorted(chain.from_iterable(files(data, stage) for stage in ("train", "val", "test"))) == list(
        "012345"
    )
    assert fits(*data.samples("train")[0])


def test_a_folder_per_stage_with_images_and_masks_side_by_side(tmp_path):
    for stage, first in {"train": 0, "test": 6}.items():
        for i in range(first, first + 6):
            save(tmp_path / stage / f"{i}.png", colour(random_mask(i)))
            save(tmp_path / stage / f"{i}_mask.png", random_mask(i))
    data = FolderDataModule(tmp_path, 3, images=".", masks=".", mask_suffix="_mask", val=0.2)
    assert [len(files(data, stage)) for stage in ("train", "val", "test")] == [5, 1, 6]
    assert fits(*data.samples("test")[0])


def test_a_file_without_partner_is_named_with_its_folder(tmp_path):
    for name in ("images/a/1.png", "images/b/1.png", "masks/a/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"1 of 2 images have no partner .*: 1\.png \(in b\); names must agree"
    ):
        find_pairs(tmp_path / "images", tmp_path / "masks")
