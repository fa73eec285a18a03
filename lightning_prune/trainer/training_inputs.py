"""Single training images without augmentation, for what is calibrated after training."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import nn
from torch.utils.data import DataLoader, default_collate

from lightning_prune.compensation.calibration import CompensationError
from lightning_prune.utils.example_inputs import inputs_of

__all__ = ["training_inputs"]


def training_inputs(data: L.LightningDataModule, target: nn.Module, number: int) -> list[Any]:
    """Return inputs of single training images without augmentation, spread evenly over the training set.

    Each is a tuple of positional inputs, or a dictionary of keyword inputs.

    Args:
        data: its training set is read.
        target: the network; an input is what its forward takes of a batch.
        number: of images; fewer if the set has fewer.

    Raises:
        CompensationError: there is not one training loader over a data set with a length.
    """
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        raise CompensationError(
            f"the training data of {type(data).__name__} are not one DataLoader over a data set with a length"
        )
    dataset = loader.dataset
    dataset = dataset.without_augmentation() if hasattr(dataset, "without_augmentation") else dataset
    last = len(dataset) - 1
    steps = max(1, min(number, len(dataset)) - 1)
    indices = dict.fromkeys(round(n * last / steps) for n in range(min(number, len(dataset))))
    collate = loader.collate_fn or default_collate
    examples = [inputs_of(collate([dataset[index]]), target.forward) for index in indices]
    return [example[0] or example[1] for example in examples if example is not None]
