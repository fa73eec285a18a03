"""The ICBM-152 brain template, read from the installed nilearn package."""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FIELD = 192  # side of the cube that holds the brain, in voxels of 1 mm
_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


def template_folder() -> Path:
    """Return the folder of the template inside the installed nilearn.

    Raises:
        ModuleNotFoundError: nilearn is not installed.
    """
    spec = find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("BrainSlices needs nilearn's template: pip install lightning-prune[demo]")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


@lru_cache(maxsize=1)
def load_template() -> NDArray[np.uint8]:
    """Return T1 intensity, grey- and white-matter probability, each 0 to 255: ``(3, FIELD, FIELD, FIELD)``.

    The brain is in the middle. The spatial axes are left to right, back to front, bottom to top.

    Raises:
        ModuleNotFoundError: nilearn is not installed.
        FileNotFoundError: this version of nilearn does not contain the files.
    """
    files = [template_folder() / _FILE.format(kind) for kind in ("t1", "gm", "wm")]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing from nilearn: pip install 'nilearn>=0.11,<1'")
    from nibabel.nifti1 import Nifti1Image  # comes with nilearn, which is optional

    return _centred(np.stack([np.asarray(Nifti1Image.from_filename(file).dataobj) for file in files]))


def extent(volume: NDArray[np.uint8], axis: int, share: float = 0.1) -> tuple[int, int]:
    """Return the first and last slice along an axis that contain tissue.

    Args:
        volume: ``(3, x, y, z)`` as from `load_template`.
        axis: 0, 1 or 2.
        share: least tissue of a slice, as share of the slice with most tissue.
    """
    tissue = volume[1].astype(np.uint16) + volume[2] > 127
    area = tissue.sum(axis=tuple(a for a in range(3) if a != axis))
    inside = np.flatnonzero(area >= share * area.max())
    return int(inside[0]), int(inside[-1])


def _centred(volume: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Crop or pad every spatial axis to ``FIELD``, with the brain in the middle."""
    for axis in range(3):
        first, last = extent(volume, axis, share=0.0001)
        start = (first + last + 1 - FIELD) // 2
        index = np.arange(start, start + FIELD)
        inside = (index >= 0) & (index < volume.shape[1 + axis])
        padded = np.zeros((*volume.shape[: 1 + axis], FIELD, *volume.shape[2 + axis :]), dtype=np.uint8)
        np.moveaxis(padded, 1 + axis, 0)[inside] = np.moveaxis(volume, 1 + axis, 0)[index[inside]]
        volume = padded
    return volume
