"""Files in the format of CIFAR-10's python version, for tests without the data set."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np


def write_cifar(root: Path, per_file: int = 20) -> Path:
    """Write the six files; an image of class c has grey value 20 c, plus noise, and its first pixel is its number."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        labels = [n % 10 for n in range(per_file)]
        data = 20 * np.array(labels)[:, None] + rng.integers(0, 40, (per_file, 3072))
        data[:, 0] = number * per_file + np.arange(per_file)
        content = {b"data": data.astype(np.uint8), b"labels": labels, b"batch_label": b"x", b"filenames": []}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return root
