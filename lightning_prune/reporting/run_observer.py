"""Callback that gathers what the page of a run shows: learning rates, outputs and mistakes of the dense network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_prune.callbacks.method_callback import PruningCallback
from lightning_prune.reporting.examples import Examples, NoExamples, choose, predict
from lightning_prune.utils.metrics import CONFUSION_CLASSES

__all__ = ["RunObserver"]


class RunObserver(L.Callback):
    """Logs the learning rate of each epoch as ``lr``; keeps outputs and mistakes of the network before its first cut.

    Put it before the pruning callback: it looks at the network at the end of each epoch, until the first cut, by
    running a few validation images through it. Checkpoints keep what it has of the dense network. Training does not
    depend on it: an error there is kept as a text.

    Args:
        pruning: the pruning callback; None: the network stays dense.
        examples: whether to keep outputs.
        classes: names of the classes, if the module has no ``class_names``.

    Attributes:
        confusion: of the classes by the dense network in its last validation, as ``val_confusion`` of the module;
            None if there is none. Checkpoints keep it.
        confusion_epoch: number of trained epochs of that network.

    Example:
        >>> RunObserver(None).problem
        ''
    """

    def __init__(
        self, pruning: PruningCallback | None, examples: bool = True, classes: Sequence[str] = ()
    ) -> None:
        self.pruning, self.examples, self.classes = pruning, examples, classes
        self.dense: Examples | None = None
        self.problem = ""
        self.confusion: Tensor | None = None
        self.confusion_epoch: int | None = None
        self._earlier: dict[str, Any] | None = None  # what a checkpoint keeps of `dense`
        self._samples: Any = None
        self._numbers: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept of the dense network: a run that is resumed after its first cut has no other."""
        state = {"confusion": self.confusion, "confusion_epoch": self.confusion_epoch}
        if self.dense is None:
            return {**state, "examples": self._earlier}
        outputs = [torch.from_numpy(output) for output in self.dense.outputs["dense"]]
        examples = {"outputs": outputs, "numbers": self._numbers, "epoch": self.dense.dense_epoch}
        return {**state, "examples": examples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what is kept of the dense network."""
        self.confusion, self.confusion_epoch = state_dict["confusion"], state_dict["confusion_epoch"]
        self._earlier = state_dict.get("examples")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the learning rate of the first group of each optimizer."""
        rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in trainer.optimizers]
        names = ["lr"] if len(rates) == 1 else [f"lr/{number}" for number in range(len(rates))]
        pl_module.log_dict(dict(zip(names, rates, strict=True)), on_step=False, on_epoch=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the data set of the first validation loader: after a test, the trainer has none."""
        loaders = trainer.val_dataloaders
        first = loaders[0] if isinstance(loaders, (list, tuple)) and loaders else loaders
        self._samples = getattr(first, "dataset", None)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the confusion of a network that is still dense."""
        if self._uncut and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.confusion, self.confusion_epoch = _confusion_of(pl_module), trainer.current_epoch + 1

    @property
    def _uncut(self) -> bool:
        """Whether the network will be pruned, and was not yet."""
        return self.pruning is not None and not self.pruning.record

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the outputs of a network that is still dense."""
        if self._uncut and self.examples and trainer.is_global_zero:
            try:
                found = self._predict(pl_module, "dense")
                self.dense = found.with_dense(found.outputs["dense"], trainer.current_epoch + 1)
            except (
                Exception
            ) as error:  # a picture for the report must not end a training, whatever a network raises
                self.problem = str(error) or type(error).__name__

    def confusions(self, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return the confusion by the dense network and in the last validation, as arguments of a summary."""
        dense, final = self.confusion, _confusion_of(pl_module)
        if final is None:
            return {}
        own = {"dense": dense.tolist()} if dense is not None and dense.shape == final.shape else {}
        epoch = self.confusion_epoch if own else None
        return {"val_confusion": {**own, "final": final.tolist()}, "dense_epoch": epoch}

    def finish(self, pl_module: L.LightningModule) -> Examples:
        """Return the images with the outputs of the trained network, and of the dense one if there are any.

        Raises:
            NoExamples: there are none; the text says why.
        """
        final = self._predict(pl_module, "final")
        if self.dense is not None and self.dense.shows_same_images(final):
            return final.with_dense(self.dense.outputs["dense"], self.dense.dense_epoch)
        return (
            final if self.dense is not None or self._earlier is None else _with_earlier(final, self._earlier)
        )

    def _predict(self, pl_module: L.LightningModule, name: str) -> Examples:
        if self._samples is None:
            raise NoExamples("the run has no validation data")
        self._numbers = self._numbers or choose(self._samples)
        classes = getattr(pl_module, "class_names", None) or self.classes
        return predict(pl_module, self._samples, self._numbers, name, classes)


def _confusion_of(module: L.LightningModule) -> Tensor | None:
    """Return the confusion of the last validation; None if there is none, or too many classes to keep it."""
    confusion: Tensor | None = getattr(module, "val_confusion", None)
    return None if confusion is None or len(confusion) > CONFUSION_CLASSES else confusion


def _with_earlier(final: Examples, earlier: Mapping[str, Any]) -> Examples:
    """Return the images with the outputs of the dense network in a checkpoint, if they are of the same images."""
    outputs = [output.numpy() for output in earlier["outputs"]]
    shapes = [[output.shape for output in each] for each in (outputs, final.outputs["final"])]
    if list(earlier["numbers"]) != list(final.numbers) or shapes[0] != shapes[1]:
        return final
    return final.with_dense(outputs, earlier["epoch"])
