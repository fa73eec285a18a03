"""Eyes: the data sets MOBIUS and SBVPI, in folders as they are shipped (https://sclera.fri.uni-lj.si/datasets.html).

Both come on request from the University of Ljubljana, for research. What is expected::

    MOBIUS/Images/<subject>/<subject>_<phone><light>_<eye><gaze>_<number>.jpg      Images/1/1_1i_Ll_1.jpg
    MOBIUS/Masks/<subject>/<the same name>.png                                     Masks/1/1_1i_Ll_1.png
    SBVPI/<subject>/<subject><eye>_<gaze>_<number>.jpg                             1/1L_l_1.jpg
    SBVPI/<subject>/<the same name>_<part>.png                                     1/1L_l_1_sclera.png

Images without mask are left out: those of two thirds of MOBIUS' subjects, its deliberately bad ones, and many of
SBVPI's for parts other than the sclera. Nobody is in two of train, val and test: the split is by subject.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_prune.data.folder import FileSamples, FolderDataModule, split
from lightning_prune.data.image_files import Pair, Palette, files_by_key, find_pairs
from lightning_prune.data.transforms import Transform

__all__ = ["MOBIUS", "SBVPI"]

SBVPI_PARTS = ("sclera", "iris", "pupil", "vessels", "canthus", "eyelashes")
GREEN, TOLERANCE = (0, 255, 0), 3  # of a painted part, and how far off a colour may be


class EyeData(FolderDataModule):
    """What the two have in common: names that tell the subject, and a split by subject.

    A subclass has ``names``, a pattern for the names of its images that has the subject as a group, ``example``, an
    image that is expected, ``class_names``, and, where masks are coloured, ``colours``.
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
        """All images that have masks."""

    def subject(self, pair: Pair) -> str:
        """Whose eye it is.

        Raises:
            ValueError: the file is not named as expected.
        """
        found = self.names.fullmatch(pair.image.stem)
        if found is None:
            raise ValueError(f"{pair.image} is not named as in {self._layout()}: rename it or move it away")
        return found["subject"]

    def pairs(self) -> dict[str, list[Pair]]:
        """The files of each stage; the shares are those of the subjects.

        Raises:
            FileNotFoundError: nothing is where it is expected.
            ValueError: names are not as expected, or there are too few subjects.
        """
        found = self.find()
        if not found:
            raise FileNotFoundError(f"no image with its masks in {self.root}: expected is {self._layout()}")
        subjects = [self.subject(pair) for pair in found]
        shares = {"val": self.val_share, "test": self.test_share}
        stages = split(sorted(set(subjects)), shares, self.seed, "subjects")
        return {
            stage: [pair for pair, subject in zip(found, subjects, strict=True) if subject in members]
            for stage, members in stages.items()
        }

    def _layout(self) -> str:
        return f"{type(self).__name__} as it is shipped, {self.root / self.example}"

    def _folder(self, folder: Path) -> Path:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: expected is {self._layout()}; check root")
        return folder

    def _way_out(self, stage: str) -> str:
        return f"give {stage} a larger share of the subjects"


class MOBIUS(EyeData):
    """Mobile ocular biometrics (Vitek et al., 2020): sclera, iris and pupil in photographs by three phones.

    3,559 of 16,717 images have masks, those of 35 of the 100 subjects.

    Args:
        root: the folder that holds ``Images`` and ``Masks``.
        size: resize to ``(h, w)``; the images have 1700 x 3000 pixels.
        channels: 3 for colour, 1 for grey.
        val: share of the subjects for validation.
        test: share of the subjects for testing.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: see `SegmentationData`.
        seed: for the split, and the order of the training samples.
        distance_maps: see `SegmentationData`.

    Raises:
        FileNotFoundError: when it is used: something is not where it is expected.
        ValueError: names or colours are not as expected, masks have no images, or there are too few subjects.

    Example:
        >>> MOBIUS("MOBIUS").class_names
        ('background', 'sclera', 'iris', 'pupil')
    """

    class_names = ("background", "sclera", "iris", "pupil")
    names = re.compile(r"(?P<subject>\d+)_\d[inp]_[LR][lrsu]_(\d+|bad)")
    example = "Images/1/1_1i_Ll_1.jpg with Masks/1/1_1i_Ll_1.png"
    colours: Palette = {(0, 0, 0): 0, (255, 0, 0): 1, (0, 255, 0): 2, (0, 0, 255): 3}

    def find(self) -> list[Pair]:
        """All images that have masks."""
        images, masks = self._folder(self.root / "Images"), self._folder(self.root / "Masks")
        return find_pairs(images, masks, unmasked=True)


class SBVPI(EyeData):
    """Sclera blood vessels, periocular and iris (Rot et al., 2020): 1,858 photographs of the eyes of 55 subjects.

    Each part has a mask of its own, painted in pure green, or white on black. Every image has one of the sclera,
    the other parts only some of them.

    Args:
        root: the folder that holds one folder for each subject.
        parts: that make the classes 1, 2, ..., later ones over earlier ones; of ``"sclera"``, ``"iris"``,
            ``"pupil"``, ``"vessels"``, ``"canthus"``, ``"eyelashes"``. Images that lack one of these masks are left
            out.
        size: resize to ``(h, w)``; the images have about 2000 x 3000 pixels.
        channels: 3 for colour, 1 for grey.
        val: share of the subjects for validation.
        test: share of the subjects for testing.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: see `SegmentationData`.
        seed: for the split, and the order of the training samples.
        distance_maps: see `SegmentationData`.

    Raises:
        FileNotFoundError: when it is used: something is not where it is expected.
        ValueError: there is no such part; when it is used: there are too few subjects.

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
        """All images that have a mask of every part; the pair holds the first."""
        files = files_by_key(self._folder(self.root))
        images = [file for key, file in files.items() if self.names.fullmatch(Path(key).name)]
        whole = [file for file in images if all(part_file(file, part).is_file() for part in self.parts)]
        return [Pair(file, part_file(file, self.parts[0])) for file in whole]

    def _samples(self, pairs: Sequence[Pair]) -> FileSamples:
        return PartSamples(pairs, self.parts, self.size, self.channels)


class PartSamples(FileSamples):
    """Images of SBVPI with the masks of some parts laid over each other."""

    def __init__(
        self, pairs: Sequence[Pair], parts: Sequence[str], size: tuple[int, int] | None, channels: int
    ) -> None:
        super().__init__(pairs, len(parts) + 1, size, channels)
        self.parts = parts

    def mask(self, pair: Pair) -> Tensor:
        """Class numbers ``(h, w)`` int64: 0, and one for each part."""
        masks = [read_part(part_file(pair.image, part)) for part in self.parts]
        if len(sizes := {mask.shape for mask in masks}) > 1:
            raise ValueError(f"the masks of {pair.image} differ in size (h, w): {sorted(sizes)}")
        classes = np.zeros(masks[0].shape, dtype=np.int64)
        for number, mask in enumerate(masks, 1):
            classes[mask] = number
        return torch.from_numpy(classes)


def part_file(image: Path, part: str) -> Path:
    """The mask of a part of an image.

    Example:
        >>> part_file(Path("1/1L_l_1.jpg"), "iris").name
        '1L_l_1_iris.png'
    """
    return image.with_name(f"{image.stem}_{part}.png")


def read_part(file: Path) -> NDArray[np.bool_]:
    """Where the part is, ``(h, w)``: what is pure green in a coloured file, what is bright in a grey one."""
    with Image.open(file) as opened:
        pixels = np.array(opened.convert("RGB"))
    if not (np.ptp(pixels, axis=2) > TOLERANCE).any():
        return np.asarray(pixels[..., 0] > 127)
    return np.asarray((np.abs(pixels.astype(np.int16) - GREEN) <= TOLERANCE).all(2))
