"""``PrunerCallback``: prune in the ``Trainer`` of Transformers."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from lightning_prune.pruning.pruner import Pruner
from lightning_prune.serialization.torch_file import load_torch_file
from lightning_prune.utils.atomic import atomic_write
from lightning_prune.utils.distributed import is_first

__all__ = ["PrunerCallback"]

FILE = "pruner.pt"


class PrunerCallback(TrainerCallback):
    """Let a :class:`~lightning_prune.Pruner` prune the network of a ``transformers.Trainer``.

    It observes the training forwards, cuts when the Pruner says so, and adds the Pruner's state to each checkpoint.
    To resume, call :meth:`resume` before ``Trainer.train``.

    Args:
        pruner: of the model that the trainer gets.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> PrunerCallback(Pruner(net, torch.zeros(1, 1, 8, 8), {"macs": 0.5})).pruner.finished
        False
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self._observation = ExitStack()

    @classmethod
    def of(cls, trainer: Trainer) -> PrunerCallback:
        """Return the callback of a trainer.

        Raises:
            ValueError: it has none.
        """
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, cls):
                return callback
        raise ValueError(
            "the trainer has no PrunerCallback: give it one, as callbacks=[PrunerCallback(pruner)]"
        )

    def resume(self, folder: str | Path) -> str:
        """Give the network the sizes of a checkpoint, and return its folder for ``resume_from_checkpoint``.

        Args:
            folder: a checkpoint, or the ``output_dir`` with several, of which the last one is taken.

        Raises:
            ValueError: there is no checkpoint, or it is not one of this callback; nothing was changed.
        """
        path = Path(folder)
        last = None if path.name.startswith(PREFIX_CHECKPOINT_DIR) else get_last_checkpoint(str(path))
        path = path if last is None else Path(last)
        if not (path / FILE).is_file():
            raise ValueError(f"{path} has no {FILE}: it is no checkpoint of a training with a PrunerCallback")
        self.pruner.load_state_dict(load_torch_file(path / FILE))
        return str(path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the trainer trains the network of the Pruner."""
        self._observation.close()  # of a batch that an exception has ended
        if kwargs["model"] is not self.pruner.model:
            raise ValueError(
                f"the trainer trains another {type(kwargs['model']).__name__} than the Pruner was given: make the "
                "Pruner of the model that the trainer gets; with model_init, make it of trainer.model"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe the batches of one optimizer step."""
        self._observation.close()
        self._observation.enter_context(self.pruner.observe())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop observing, and cut if the Pruner counts steps."""
        self._observation.close()
        if self.pruner.counts_steps:
            self.pruner.step(kwargs["optimizer"], state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Cut if the Pruner counts epochs."""
        if not self.pruner.counts_steps:
            self.pruner.step(kwargs["optimizer"], round(state.epoch or 0) - 1)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the Pruner's state to the checkpoint."""
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if is_first():
            with atomic_write(folder / FILE) as temporary:
                torch.save(self.pruner.state_dict(), temporary)
