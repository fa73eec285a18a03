"""Files with several images, or with numbers of their own: TIFF, DICOM and NIfTI, by tifffile, pydicom and nibabel.

The three packages come with ``pip install lightning-prune[medical]``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["TIFFS", "VOLUMES", "Limits", "Volume", "num_volume_slices", "read_volume"]

TIFFS = (".tif", ".tiff")
DICOMS, NIFTIS = (".dcm", ".dicom"), (".nii", ".nii.gz", ".mgz")
VOLUMES = (*DICOMS, *NIFTIS)
#: numbers that are shown black and white; None: 0 and 1
Limits = tuple[float, float] | None
PERCENTILES = (
    0.5,
    99.5,
)  # of a volume, as its black and white: a few extreme numbers do not flatten the rest
CACHE_BYTES = 1 << 30  # of volumes that a process keeps; slices of one are read one by one


class Volume(NamedTuple):
    """Images of one file.

    Attributes:
        values: ``(slices, h, w)`` or ``(slices, h, w, c)``, as stored.
        limits: which numbers mean black and white.
    """

    values: NDArray[Any]
    limits: Limits


_cache: OrderedDict[tuple[Path, int], Volume] = OrderedDict()


def read_volume(file: Path) -> Volume:
    """Return all images of a file; the last ones that were read are kept in memory, up to 1 GB.

    Raises:
        ImportError: the package that reads it is not installed.
        ValueError: it has another number of dimensions.
    """
    key = (file, file.stat().st_mtime_ns)
    if key not in _cache:
        _cache[key] = _reader(file)(file)
        while len(_cache) > 1 and sum(volume.values.nbytes for volume in _cache.values()) > CACHE_BYTES:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    return _cache[key]


def num_volume_slices(file: Path) -> int:
    """Return how many images a file has, from its header where the format tells."""
    name = file.name.lower()
    if name.endswith(NIFTIS):
        shape = _package("nibabel").load(file).shape
        return int(shape[2]) if len(shape) > 2 else 1
    if name.endswith(DICOMS):
        header = _package("pydicom").dcmread(file, stop_before_pixels=True)
        return int(header.get("NumberOfFrames") or 1)
    with _package("tifffile").TiffFile(file) as tiff:
        axes, shape = _only_series(tiff)
        return math.prod(size for axis, size in zip(axes, shape, strict=True) if axis not in "YXSC")


def _package(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this kind of file needs the package {name}: pip install 'lightning-prune[medical]'"
        ) from error


def _reader(file: Path) -> Callable[[Path], Volume]:
    if file.name.lower().endswith(NIFTIS):
        return _read_nifti
    return _read_dicom if file.name.lower().endswith(DICOMS) else _read_tiff


def _read_nifti(file: Path) -> Volume:
    """Read slices from foot to head (axial), each with the front of the body on top."""
    nibabel = _package("nibabel")
    image = nibabel.as_closest_canonical(nibabel.load(file))  # masks are often stored in another order
    values = np.asanyarray(image.dataobj)
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3, 4):
        raise ValueError(f"it has {values.ndim} dimensions; a volume has 3, or 4 with channels")
    values = values.reshape(*values.shape[:2], 1) if values.ndim == 2 else values
    slices = np.ascontiguousarray(np.moveaxis(values, 2, 0).swapaxes(1, 2)[:, ::-1])
    return Volume(slices, _percentiles(slices))


def _read_dicom(file: Path) -> Volume:
    """Read frames in the units of the modality, such as Hounsfield units; dark and bright as in MONOCHROME2."""
    pixels = _package("pydicom.pixels")
    header = _package("pydicom").dcmread(file)
    values = header.pixel_array
    colour = header.get("SamplesPerPixel", 1) > 1
    if not colour:
        values = pixels.apply_modality_lut(values, header)
        values = values.max() - values if header.get("PhotometricInterpretation") == "MONOCHROME1" else values
    values = values[None] if values.ndim == (3 if colour else 2) else values
    return Volume(values, (0.0, 255.0) if colour and values.dtype == np.uint8 else _percentiles(values))


def _read_tiff(file: Path) -> Volume:
    with _package("tifffile").TiffFile(file) as tiff:
        axes, shape = _only_series(tiff)
        values = tiff.series[0].asarray()
    order = sorted(range(len(axes)), key=lambda n: ("YX".find(axes[n]) + 1) or (3 if axes[n] in "SC" else 0))
    rows, columns = shape[axes.index("Y")], shape[axes.index("X")]
    channels = math.prod(size for axis, size in zip(axes, shape, strict=True) if axis in "SC")
    ends = (channels,) if channels > 1 else ()
    values = values.transpose(order).reshape(-1, rows, columns, *ends)
    return Volume(values, _limits_of(values))


def _only_series(tiff: Any) -> tuple[str, tuple[int, ...]]:
    """Return the axes and the shape of a TIFF file with pages of one size."""
    series = tiff.series
    if len(series) != 1:
        sizes = [tuple(each.shape) for each in series[:3]]
        raise ValueError(f"its pages have different sizes, {sizes}: split the file")
    return str(series[0].axes), tuple(series[0].shape)


def _limits_of(values: NDArray[Any]) -> Limits:
    """Return black and white of stored numbers; those of floating point stay as they are."""
    if np.issubdtype(values.dtype, np.floating):
        return None
    if values.dtype in (np.uint8, np.uint16):
        return (0.0, float(np.iinfo(values.dtype).max))
    return (0.0, 1.0) if values.dtype == np.bool_ else _percentiles(values)


def _percentiles(values: NDArray[Any]) -> Limits:
    numbers = values.ravel()[:: max(1, values.size // 2_000_000)]
    low, high = np.percentile(numbers, PERCENTILES)
    return (float(low), float(high)) if high > low else (float(numbers.min()), float(numbers.min()) + 1)
