"""Brain slices: grey and white matter of the ICBM-152 template, read from the installed nilearn package.

Nothing is downloaded. One average brain serves as a demonstration, not as a medical benchmark. Test slices must
still not leak into training. Slices of one volume can leak in three ways, each with a remedy:

- *Neighbouring slices* are alike. Along each axis train, val and test are contiguous blocks, separated by gaps of
  ``gap`` millimetres that belong to no set.
- *Left and right* are identical: the template is exactly symmetric, so a sagittal slice of the right half is the
  mirror image of one of the left half. Sagittal slices come from one half, and the blocks of that axis are mirrored.
- *Axes cross.* A sagittal training slice contains a column of every axial test slice. Such voxels are blanked
  (intensity 0, class "other") before resampling: train and val slices show no voxel of a test slice or of its gaps,
  and train slices none of a val slice or of its gaps. Test slices are whole. ``blank=False`` leaves all slices
  whole, and then voxels leak.

With blocks along all three axes, blanking leaves less than half of a training slice, in small pieces, and networks
learn slowly. By default there are blocks along one axis only, ``held_out``: the training slices lie along all three
axes (with blanked bands in those along the two others), val and test slices are whole and lie along ``held_out``.

All sets share the contrast, shape and registration of the one brain; this cannot be avoided.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_prune.data.base import Sample, Samples, SegmentationData
from lightning_prune.data.icbm152 import FIELD, extent, load_template
from lightning_prune.data.transforms import Transform

CLASS_NAMES = ("other", "grey", "white")
AXES = ("sagittal", "coronal", "axial")

# Levels: the use of a coordinate along an axis. A set may show voxels of its own level and of lower ones.
TRAIN, VAL_GAP, VAL, TEST_GAP, TEST = range(5)
LEVELS = {"train": TRAIN, "val": VAL, "test": TEST}


def split_axis(length: int, val: float, test: float, gap: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the level of each of ``length`` coordinates: a val and a test block between three train blocks.

    Args:
        length: number of coordinates.
        val: share of the coordinates for validation.
        test: share of the coordinates for testing.
        gap: number of unused coordinates on either side of a val or test block.
        rng: draws the order of the two blocks and their places.

    Returns:
        ``(length,)`` of ``TRAIN``, ``VAL_GAP``, ``VAL``, ``TEST_GAP``, ``TEST``.

    Raises:
        ValueError: fewer than three coordinates remain for training.

    Example:
        >>> split_axis(14, val=0.2, test=0.2, gap=1, rng=np.random.default_rng(0))
        array([0, 1, 2, 2, 2, 1, 0, 0, 3, 4, 4, 4, 3, 0])
    """
    counts = {VAL: round(val * length), TEST: round(test * length)}
    gaps = {level: gap if count else 0 for level, count in counts.items()}
    free = length - sum(counts.values()) - 2 * sum(gaps.values())
    if free < 3:
        raise ValueError(f"val={val}, test={test} and gap={gap} leave {free} of {length} slices for training")
    cuts = np.rint(np.cumsum(rng.dirichlet((8.0, 8.0, 8.0))) * free).astype(int)
    trains = np.diff(cuts, prepend=0)
    a, b = rng.permutation([VAL, TEST]).tolist()
    blocks = (TRAIN, a - 1, a, a - 1, TRAIN, b - 1, b, b - 1, TRAIN)
    lengths = (trains[0], gaps[a], counts[a], gaps[a], trains[1], gaps[b], counts[b], gaps[b], trains[2])
    return np.repeat(blocks, lengths)


def plan_axis(
    volume: NDArray[np.uint8], axis: int, val: float, test: float, gap: int, seed: int
) -> NDArray[np.int64]:
    """Return the level of each coordinate of one axis, ``(FIELD,)``; mirrored along the first axis."""
    first, last = extent(volume, axis)
    half = axis == 0
    stop = (first + last) // 2 if half else last
    levels = np.full(volume.shape[1 + axis], TRAIN, dtype=np.int64)
    levels[first : stop + 1] = split_axis(
        stop + 1 - first, val, test, gap, np.random.default_rng([seed, axis])
    )
    return np.maximum(levels, _mirrored(levels, first + last)) if half else levels


def positions(volume: NDArray[np.uint8], axis: int, count: int) -> NDArray[np.int64]:
    """Return ``count`` evenly spaced slice numbers; along the first axis from one half only.

    Raises:
        ValueError: there are fewer slices.
    """
    first, last = extent(volume, axis)
    last = (first + last) // 2 if axis == 0 else last
    if not 0 < count <= last + 1 - first:
        raise ValueError(f"slices_per_axis={count}: {AXES[axis]} has 1 to {last + 1 - first}")
    return np.unique(np.rint(np.linspace(first, last, count)).astype(np.int64))


def cut_slices(
    volume: NDArray[np.uint8],
    axis: int,
    where: NDArray[np.int64],
    visible: Sequence[NDArray[np.bool_]],
    size: int,
) -> tuple[Tensor, Tensor]:
    """Cut slices perpendicular to one axis, blank the voxels that must not be seen, and resample.

    Args:
        volume: ``(3, x, y, z)`` as from `load_template`.
        axis: 0, 1 or 2.
        where: slice numbers ``(n,)``.
        visible: for each axis, which coordinates may be seen.
        size: side of the result in pixels.

    Returns:
        Images ``(n, 1, size, size)`` float32 in 0 to 1, and masks ``(n, size, size)`` uint8. The top row is the
        top or the front of the head.
    """
    columns, rows = (a for a in range(3) if a != axis)
    maps = np.moveaxis(volume, 1 + axis, 1)[:, where]  # (3, n, columns, rows)
    maps = maps * (visible[columns][:, None] & visible[rows])
    maps = np.ascontiguousarray(maps.swapaxes(2, 3)[:, :, ::-1])
    pixels = torch.from_numpy(maps).transpose(0, 1).float() / 255  # (n, 3, rows, columns)
    pixels = interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    t1, grey, white = pixels.unbind(1)
    mask = torch.stack([1 - grey - white, grey, white], 1).argmax(1)
    return t1[:, None].contiguous(), mask.to(torch.uint8)


def _mirrored(levels: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Return ``levels[total - i]`` for each ``i``; ``TRAIN`` where that index does not exist."""
    index = total - np.arange(len(levels))
    inside = (index >= 0) & (index < len(levels))
    return np.where(inside, levels[np.clip(index, 0, len(levels) - 1)], TRAIN)


def _axis_numbers(argument: str, names: Sequence[str], allowed: Sequence[str]) -> list[int]:
    """Return the numbers of the named axes, ascending; raise ValueError for other names."""
    if not names or set(names) - set(allowed):
        raise ValueError(f"{argument}={list(names)}: choose from {list(allowed)}")
    return sorted({AXES.index(name) for name in names})


class SliceSamples:
    """Samples of images ``(n, 1, s, s)`` float32 and masks ``(n, s, s)`` uint8 in memory."""

    def __init__(self, images: Tensor, masks: Tensor) -> None:
        self.images = images
        self.masks = masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.images[index], self.masks[index].long()


class BrainSlices(SegmentationData):
    """2-D slices of the ICBM-152 T1 volume with three classes: other, grey matter, white matter.

    The docstring of the module describes how leaks between the sets are avoided. Loading the template takes a third
    of a second.

    Args:
        size: side of the square images in pixels; the field of view is 192 mm.
        axes: any of ``"sagittal"``, ``"coronal"``, ``"axial"``. With one axis nothing is blanked.
        held_out: the axes along which val and test have their blocks; all slices along the other axes are for
            training. None: the last one of ``axes`` in the order above.
        slices_per_axis: number of slices, evenly spaced over the brain (over one half for sagittal); slices in
            gaps are left out.
        val: share of each held-out axis for validation.
        test: share of each held-out axis for testing.
        gap: millimetres between the blocks.
        blank: blank the voxels that a set must not show.
        batch_size: see `SegmentationData`.
        num_workers: see `SegmentationData`.
        transform: see `SegmentationData`.
        seed: seed of the places of the blocks and of the order of the training slices.
        distance_maps: see `SegmentationData`.

    Raises:
        ValueError: an axis is unknown; when samples are loaded: the shares leave nothing for training.
        ModuleNotFoundError: when samples are loaded: nilearn is not installed.

    Example:
        >>> image, mask = BrainSlices(size=64, slices_per_axis=20).samples("test")[0]
        >>> image.shape, mask.shape, mask.unique()
        (torch.Size([1, 64, 64]), torch.Size([64, 64]), tensor([0, 1, 2]))
    """

    in_channels = 1
    num_classes = 3
    class_names = CLASS_NAMES

    def __init__(
        self,
        size: int = 96,
        axes: Sequence[str] = AXES,
        held_out: Sequence[str] | None = None,
        slices_per_axis: int = 64,
        val: float = 0.15,
        test: float = 0.15,
        gap: int = 3,
        blank: bool = True,
        batch_size: int = 8,
        num_workers: int = 0,
        transform: Transform | None = None,
        seed: int = 0,
        distance_maps: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, transform, seed, distance_maps)
        self.size = size
        self.axes = _axis_numbers("axes", axes, AXES)
        names = [AXES[axis] for axis in self.axes]
        self.held_out = _axis_numbers("held_out", names[-1:] if held_out is None else held_out, names)
        self.slices_per_axis = slices_per_axis
        self.val_share, self.test_share, self.gap = val, test, gap
        self.blank = blank

    def levels(self) -> list[NDArray[np.int64]]:
        """Return the level of each coordinate of the three axes; ``TRAIN`` along axes not in ``held_out``."""
        volume = load_template()
        all_train = np.full(FIELD, TRAIN, dtype=np.int64)
        shares = (self.val_share, self.test_share, self.gap, self.seed)
        return [plan_axis(volume, axis, *shares) if axis in self.held_out else all_train for axis in range(3)]

    def load(self) -> Mapping[str, Samples]:
        """Cut the slices of the three sets."""
        levels = self.levels()
        return {stage: self._cut(levels, level) for stage, level in LEVELS.items()}

    def _cut(self, levels: Sequence[NDArray[np.int64]], level: int) -> SliceSamples:
        """Cut the slices of the set with the given level, along all axes."""
        volume = load_template()
        visible = [axis_levels <= (level if self.blank else TEST) for axis_levels in levels]
        parts = []
        for axis in self.axes:
            where = positions(volume, axis, self.slices_per_axis)
            where = where[levels[axis][where] == level]
            if len(where):
                parts.append(cut_slices(volume, axis, where, visible, self.size))
        if not parts:
            return SliceSamples(torch.empty(0), torch.empty(0))
        images, masks = zip(*parts, strict=True)
        return SliceSamples(torch.cat(images), torch.cat(masks))

    def _advice(self, stage: str) -> str:
        return f"raise {stage} or slices_per_axis" if stage != "train" else "lower val, test or gap"
