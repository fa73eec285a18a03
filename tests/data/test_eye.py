"""MOBIUS and SBVPI, with generated files in the original layouts."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_prune.data import MOBIUS, SBVPI
from lightning_prune.data.eye import EyeData

COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
SUBJECTS = 8


def write(file: Path, pixels: np.ndarray) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return file


def eye(h: int = 20, w: int = 32) -> np.ndarray:
    """Classes of an eye: sclera around iris around pupil."""
    classes = np.zeros((h, w), np.uint8)
    classes[4:16, 4:28], classes[5:15, 11:21], classes[8:12, 14:18] = 1, 2, 3
    return classes


def photograph(h: int = 20, w: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (h, w, 3)).astype(np.uint8)


@pytest.fixture
def mobius(tmp_path: Path) -> Path:
    """Eight subjects with masks, two without, and a bad image of each."""
    for subject in range(1, SUBJECTS + 3):
        for number in ("1", "2", "bad"):
            name = f"{subject}_1i_Ll_{number}"
            write(tmp_path / "Images" / str(subject) / f"{name}.jpg", photograph())
            if subject <= SUBJECTS and number != "bad":
                write(tmp_path / "Masks" / str(subject) / f"{name}.png", COLOURS[eye()])
    (tmp_path / "data.csv").write_text("ID,Gender\n1,f\n")
    return tmp_path


@pytest.fixture
def sbvpi(tmp_path: Path) -> Path:
    """Every image has a mask of the sclera, painted over a photograph; even subjects also have iris and pupil."""
    for subject in range(1, SUBJECTS + 1):
        for number in (1, 2):
            name = tmp_path / str(subject) / f"{subject}L_l_{number}"
            write(name.with_suffix(".jpg"), photograph())
            painted = photograph() // 2
            painted[eye() > 0] = (0, 255, 0)
            write(name.with_name(f"{name.name}_sclera.png"), painted)
            write(name.with_name(f"{name.name}_periocular.png"), painted)
            if subject % 2 == 0:
                write(name.with_name(f"{name.name}_iris.png"), 255 * (eye() >= 2).astype(np.uint8))
                write(name.with_name(f"{name.name}_pupil.png"), 255 * (eye() == 3).astype(np.uint8))
    return tmp_path


def subjects(data: EyeData) -> dict[str, set[str]]:
    return {stage: {data.subject(pair) for pair in pairs} for stage, pairs in data.pairs().items()}


def test_masks_of_mobius_are_the_classes_of_their_colours(mobius):
    data = MOBIUS(mobius, size=None)
    image, mask = data.samples("train")[0]
    assert image.shape == (1, 20, 32)
    assert np.array_equal(mask, eye())
    assert data.num_classes == len(data.class_names) == int(mask.max()) + 1


def test_images_without_mask_are_left_out(mobius):
    pairs = list(chain(*MOBIUS(mobius).pairs().values()))
    assert len(pairs) == 2 * SUBJECTS
    assert all(pair.mask.is_file() and not pair.image.stem.endswith("bad") for pair in pairs)


@pytest.mark.parametrize("kind", [MOBIUS, SBVPI])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_subject_is_in_two_sets(kind, seed, request):
    root = request.getfixturevalue(kind.__name__.lower())
    sets = subjects(kind(root, val=0.25, test=0.25, seed=seed))
    assert {stage: len(members) for stage, members in sets.items()} == {"train": 4, "val": 2, "test": 2}
    assert len(set.union(*sets.values())) == SUBJECTS
    assert sets == subjects(kind(root, val=0.25, test=0.25, seed=seed))


def test_another_seed_gives_another_split(mobius):
    assert len({tuple(sorted(subjects(MOBIUS(mobius, seed=seed))["test"])) for seed in range(5)}) > 1


def test_the_sclera_of_sbvpi_is_the_green_pixels(sbvpi):
    data = SBVPI(sbvpi, size=None)
    _, mask = data.samples("test")[0]
    assert np.array_equal(mask, eye() > 0)
    assert len(list(chain(*data.pairs().values()))) == 2 * SUBJECTS


def test_parts_of_sbvpi_are_combined_and_images_that_lack_one_are_left_out(sbvpi):
    data = SBVPI(sbvpi, parts=["sclera", "iris", "pupil"], size=None, val=0.25, test=0.25)
    assert set.union(*subjects(data).values()) == {"2", "4", "6", "8"}
    _, mask = data.samples("train")[0]
    assert np.array_equal(mask, eye())


def test_sizes_and_distance_maps(mobius):
    data = MOBIUS(mobius, size=(10, 16), distance_maps=True, batch_size=2)
    image, mask, distances = next(iter(data.train_dataloader()))
    assert (image.shape, mask.shape, distances.shape) == ((2, 1, 10, 16), (2, 10, 16), (2, 4, 10, 16))
    assert torch.equal(distances[0][1] <= 0, mask[0] == 1)


@pytest.mark.parametrize(
    ("kind", "first"),
    [(MOBIUS, "Images/1/1_1i_Ll_1.jpg with Masks"), (SBVPI, "1/1L_l_1.jpg with 1/1L_l_1_sclera")],
)
def test_the_error_of_a_missing_folder_names_the_expected_files(kind, first, tmp_path):
    expected = rf"there is no folder .*missing.*the original {kind.__name__}, .*{first}"
    with pytest.raises(FileNotFoundError, match=expected):
        kind(tmp_path / "missing").setup()


def test_the_error_of_folders_without_masks_names_the_expected_files(mobius):
    for file in (mobius / "Masks").rglob("*.png"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no image with its masks .* Masks/1/1_1i_Ll_1\.png"):
        MOBIUS(mobius).setup()


def test_the_error_of_a_part_without_masks_names_the_expected_files(sbvpi):
    with pytest.raises(FileNotFoundError, match=r"no image with its masks .*1L_l_1_vessels\.png"):
        SBVPI(sbvpi, parts=["vessels"]).setup()


def test_a_mask_without_image_is_an_error(mobius):
    write(mobius / "Masks/1/1_1i_Ll_7.png", COLOURS[eye()])
    with pytest.raises(ValueError, match=r"1 of 17 masks have no partner .* 1_1i_Ll_7\.png"):
        MOBIUS(mobius).setup()


def test_a_name_without_subject_is_an_error(mobius):
    write(mobius / "Images/eye.jpg", photograph())
    write(mobius / "Masks/eye.png", COLOURS[eye()])
    with pytest.raises(ValueError, match=r"eye\.jpg is not named as in the original MOBIUS,"):
        MOBIUS(mobius).setup()


def test_a_colour_without_class_is_an_error_that_names_the_file(mobius):
    write(mobius / "Masks/1/1_1i_Ll_1.png", np.full((20, 32, 3), 255, np.uint8))
    data = MOBIUS(mobius, val=0, test=0)
    with pytest.raises(ValueError, match=r"1_1i_Ll_1\.png has 1 colours without class, #ffffff"):
        data.samples("train")[0]


def test_masks_of_different_sizes_are_an_error(sbvpi):
    write(sbvpi / "2/2L_l_1_iris.png", np.zeros((10, 10), np.uint8))
    with pytest.raises(ValueError, match=r"masks of .*2L_l_1\.jpg differ in size"):
        SBVPI(sbvpi, parts=["sclera", "iris"], val=0, test=0).samples("train")[0]


def test_too_few_subjects_and_unknown_parts_raise(mobius):
    with pytest.raises(ValueError, match=r"8 subjects, of which .* leave none for training"):
        MOBIUS(mobius, val=0.5, test=0.5).setup()
    with pytest.raises(ValueError, match=r"parts=\['retina'\]: choose from"):
        SBVPI(mobius, parts=["retina"])
    with pytest.raises(ValueError, match="give val a larger share of the subjects"):
        MOBIUS(mobius, val=0).samples("val")
