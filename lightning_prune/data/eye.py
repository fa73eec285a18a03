"""Eye images: the data sets MOBIUS and SBVPI, in their original folders.

The University of Ljubljana gives both on request, for research: https://sclera.fri.uni-lj.si/datasets.html. Expected
files::

    MOBIUS/Images/<subject>/<subject>_<phone><light>_<eye><gaze>_<number>.jpg      Images/1/1_1i_Ll_1.jpg
    MOBIUS/Masks/<subject>/<the same name>.png                                     Masks/1/1_1i_Ll_1.png
    SBVPI/<subject>/<subject><eye>_<gaze>_<number>.jpg                             1/1L_l_1.jpg
    SBVPI/<subject>/<the same name>_<part>.png                                     1/1L_l_1_sclera.png

Images without mask are left out: in MOBIUS those of two thirds of the subjects and the deliberately bad ones, in
SBVPI many for parts other than the sclera. The split is by subject: all images of a person are in one set.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_prune.data.file_samples import FileSamples
from lightning_prune.data.folder import FolderDataModule, split
from lightning_prune.data.image_files import Pair, Palette, files_by_key, find_pairs
from lightning_prune.data.mask_files import MaskCoding, coding_of
from lightning_prune.data.transforms import Transform

__all__ = ["MOBIUS", "SBVPI"]

SBVPI_PARTS = ("sclera", "iris", "pupil", "vessels", "canthus", "eyelashes")
GREEN, TOLERANCE = (0, 255, 0), 3  # colour of a painted part, and largest difference per channel


class EyeData(FolderDataModule):
    """Base class of both data sets: file names that contain the subject, and a split by subject.

    Attributes:
        names: pattern of the images' names, with a group ``subject``.
        example: paths of an expected image and its masks, for error messages.
        class_names: names of the classes.
        colours: class of each colour in the masks; None: masks are not coloured.
    """

    names: re.Pattern[str]
    example: str
    class_names: tuple[str, ...]
    colours: Palette | None = None

    def __init__(
        self,
        root: str | Path,
        size: Sequence[int] | None = (400, 640),
        channels: int = 1,
        val: float = 0.15,
        test: float = 0.15,
        batch_size: int = 8,
        num_workers: int = 0,
        transform: Transform | None = None,
        seed: int = 0,
        distance_maps: bool = False,
    ) -> None:
        super().__init__(
            root,
            len(self.class_names),
            palette=self.colours,
            size=size,
            channels=channels,
            val=val,
            test=test,
            batch_size=batch_size,
            num_workers=num_workers,
            transform=transform,
            seed=seed,
            distance_maps=distance_maps,
        )

    @abstractmethod
    def find(self) -> list[Pair]:
        """Return all images that have masks."""

    def subject(self, pair: Pair) -> str:
        """Return the subject of an image, from its name.

        Raises:
            ValueError: the name does not match the pattern.
        """
        match = self.names.fullmatch(pair.image.stem)
        if match is None:
            raise ValueError(f"{pair.image} is not named as in {self._layout()}: rename it or move it away")
        return match["subject"]

    def pairs(self) -> dict[str, list[Pair]]:
        """Return the files of each stage; the shares are shares of the subjects.

        Raises:
            FileNotFoundError: a folder is missing, or no image has its masks.
            ValueError: a name does not match the pattern, or there are too few subjects.
        """
        pairs = self.find()
        if not pairs:
            raise FileNotFoundError(f"no image with its masks in {self.root}: expected is {self._layout()}")
        subjects = [self.subject(pair) for pair in pairs]
        shares = {"val": self.val_share, "test": self.test_share}
        stages = split(sorted(set(subjects)), shares, self.seed, "subjects")
        return {
            stage: [pair for pair, subject in zip(pairs, subjects, strict=True) if subject in members]
            for stage, members in stages.items()
        }

    def check(self, stages: Mapping[str, Sequence[Pair]]) -> None:
        """Warn of nothing: the data sets are known, and split by subject."""

    def coding(self, masks: Sequence[Path]) -> MaskCoding:
        """Return how to read the masks: by their colours."""
        return coding_of(self.colours)

    def _layout(self) -> str:
        """Return the expected files, for error messages."""
        return f"the original {type(self).__name__}, {self.root / self.example}"

    def _existing(self, folder: Path) -> Path:
        """Return the folder; raise FileNotFoundError if it does not exist."""
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: expected is {self._layout()}; check root")
        return folder

    def _advice(self, stage: str) -> str:
        return f"give {stage} a larger share of the subjects"


class MOBIUS(EyeData):
    """Mobile ocular biometrics (Vitek et al., 2020): sclera, iris and pupil in photographs by three phones.

    3,559 of 16,717 images have masks, those of 35 of the 100 subjects.

    Args:
        root: the folder with ``Images`` and ``Masks``.
        size: ``(h, w)`` to resize to; the images have 1700 x 3000 pixels.
        channels: 3 for colour, 1 for grey.
        val: share of the subjects for validation.
        test: share of the subjects for testing.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: see `SegmentationData`.
        seed: seed of the split and of the order of the training samples.
        distance_maps: see `SegmentationData`.

    Raises:
        FileNotFoundError: when samples are loaded: a folder or all masks are missing.
        ValueError: when samples are loaded: names or colours do not match, masks have no images, or there are too
            few subjects.

    Example:
        >>> MOBIUS("MOBIUS").class_names
        ('background', 'sclera', 'iris', 'pupil')
    """

    class_names = ("background", "sclera", "iris", "pupil")
    names = re.compile(r"(?P<subject>\d+)_\d[inp]_[LR][lrsu]_(\d+|bad)")
    example = "Images/1/1_1i_Ll_1.jpg with Masks/1/1_1i_Ll_1.png"
    colours: Palette = {(0, 0, 0): 0, (255, 0, 0): 1, (0, 255, 0): 2, (0, 0, 255): 3}

    def find(self) -> list[Pair]:
        """Return all images that have masks."""
        images, masks = self._existing(self.root / "Images"), self._existing(self.root / "Masks")
        return find_pairs(images, masks, unmasked=True)


class SBVPI(EyeData):
    """Sclera blood vessels, periocular and iris (Rot et al., 2020): 1,858 photographs of the eyes of 55 subjects.

    Each part of the eye has a separate mask, painted in pure green, or white on black. Every image has a mask of the
    sclera; only some images have masks of the other parts.

    Args:
        root: the folder with one folder per subject.
        parts: parts of the classes 1, 2, ...; where they overlap, the later one counts. Any of ``"sclera"``,
            ``"iris"``, ``"pupil"``, ``"vessels"``, ``"canthus"``, ``"eyelashes"``. Images that lack one of these
            masks are left out.
        size: ``(h, w)`` to resize to; the images have about 2000 x 3000 pixels.
        channels: 3 for colour, 1 for grey.
        val: share of the subjects for validation.
        test: share of the subjects for testing.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: see `SegmentationData`.
        seed: seed of the split and of the order of the training samples.
        distance_maps: see `SegmentationData`.

    Raises:
        FileNotFoundError: when samples are loaded: a folder or all masks are missing.
        ValueError: there is no such part; when samples are loaded: there are too few subjects.

    Example:
        >>> SBVPI("SBVPI", parts=["sclera", "iris", "pupil"]).num_classes
        4
    """

    names = re.compile(r"(?P<subject>\d+)[LR]_[lrsu]_\d+")

    def __init__(
        self,
        root: str | Path,
        parts: Sequence[str] = ("sclera",),
        size: Sequence[int] | None = (400, 640),
        channels: int = 1,
        val: float = 0.15,
        test: float = 0.15,
        batch_size: int = 8,
        num_workers: int = 0,
        transform: Transform | None = None,
        seed: int = 0,
        distance_maps: bool = False,
    ) -> None:
        if not parts or set(parts) - set(SBVPI_PARTS) or len(set(parts)) != len(parts):
            raise ValueError(f"parts={list(parts)}: choose from {list(SBVPI_PARTS)}, each once")
        self.parts, self.class_names = tuple(parts), ("background", *parts)
        loading = (batch_size, num_workers, transform, seed, distance_maps)
        super().__init__(root, size, channels, val, test, *loading)
        self.example = f"1/1L_l_1.jpg with {' and '.join(f'1/1L_l_1_{part}.png' for part in parts)}"

    def find(self) -> list[Pair]:
        """Return all images that have a mask of every part, each with the mask of the first part."""
        files = files_by_key(self._existing(self.root))
        images = [file for key, file in files.items() if self.names.fullmatch(Path(key).name)]
        complete = [file for file in images if all(part_file(file, part).is_file() for part in self.parts)]
        return [Pair(file, part_file(file, self.parts[0])) for file in complete]

    def _samples(self, pairs: Sequence[Pair], coding: MaskCoding) -> FileSamples:
        return PartSamples(pairs, self.parts, self.size, self.channels)


class PartSamples(FileSamples):
    """Samples of SBVPI; the masks of several parts are combined to one."""

    def __init__(
        self, pairs: Sequence[Pair], parts: Sequence[str], size: tuple[int, int] | None, channels: int
    ) -> None:
        super().__init__(pairs, len(parts) + 1, size, channels)
        self.parts = parts

    def mask(self, pair: Pair) -> Tensor:
        """Return class numbers ``(h, w)`` int64: 0 for the background, then one for each part."""
        masks = [read_part(part_file(pair.image, part)) for part in self.parts]
        if len(sizes := {mask.shape for mask in masks}) > 1:
            raise ValueError(f"the masks of {pair.image} differ in size (h, w): {sorted(sizes)}")
        classes = np.zeros(masks[0].shape, dtype=np.int64)
        for number, mask in enumerate(masks, 1):
            classes[mask] = number
        return torch.from_numpy(classes)


def part_file(image: Path, part: str) -> Path:
    """Return the path of the mask of a part of an image.

    Example:
        >>> part_file(Path("1/1L_l_1.jpg"), "iris").name
        '1L_l_1_iris.png'
    """
    return image.with_name(f"{image.stem}_{part}.png")


def read_part(file: Path) -> NDArray[np.bool_]:
    """Return the pixels of a part ``(h, w)``: pure green ones in a coloured file, bright ones in a grey file."""
    with Image.open(file) as opened:
        pixels = np.array(opened.convert("RGB"))
    if not (np.ptp(pixels, axis=2) > TOLERANCE).any():
        return np.asarray(pixels[..., 0] > 127)
    return np.asarray((np.abs(pixels.astype(np.int16) - GREEN) <= TOLERANCE).all(2))
