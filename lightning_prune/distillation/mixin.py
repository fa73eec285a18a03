"""Mixin that adds distillation losses to the ``training_step`` of a LightningModule, also while it is pruned.

``total = alpha_task * task + alpha * hinton + beta * attention + lambda_ * fsp``, where ``task`` is the loss that
the module's own ``training_step`` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning as L
import torch

from lightning_prune.distillation.callback import DistillationCallback
from lightning_prune.distillation.config import Distillation
from lightning_prune.trainer.checkpoint_hooks import rename_callback_states_

__all__ = ["Distillation", "DistillationMixin"]


class DistillationMixin(L.LightningModule):
    """A LightningModule that also learns from a teacher. Write ``training_step`` as usual.

    Name it before other base classes, and set :attr:`distillation`. Each loss is logged as ``distill/<loss>``.
    Needs automatic optimization.

    Example:
        >>> from torch import nn
        >>> class Student(DistillationMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Conv2d(1, 3, 1)
        ...     def training_step(self, batch, index):
        ...         image, mask = batch
        ...         return nn.functional.cross_entropy(self.net(image), mask)
        >>> module = Student()
        >>> module.distillation = Distillation("copy", alpha=1.0, submodule="net")
        >>> "net.weight" in module.state_dict(), len(list(module.parameters()))
        (True, 2)
    """

    distillation: Distillation | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "training_step" in cls.__dict__:
            cls.training_step = _wrap_step(cls.__dict__["training_step"])  # type: ignore[method-assign]

    # torch.compile may compile the module's own step, but not the code around it.
    @torch.compiler.disable(recursive=False)
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the ``training_step`` of the next base class with the distillation losses added."""
        return _run_step(self, super().training_step.__func__, args, kwargs)  # type: ignore[attr-defined]

    def configure_callbacks(self) -> Any:
        """Return the module's callbacks and, if a distillation loss is in use, the distillation callback."""
        configured = super().configure_callbacks()
        callbacks = [configured] if isinstance(configured, L.Callback) else list(configured)
        if self.distillation is None or not self.distillation.wanted:
            return callbacks
        if self.distillation.callback is None:
            self.distillation.callback = DistillationCallback(self.distillation)
        return [*callbacks, self.distillation.callback]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Accept checkpoints in which the distillation callback still has its former name."""
        rename_callback_states_(checkpoint)
        super().on_load_checkpoint(checkpoint)


def _wrap_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``training_step`` that adds the distillation losses to ``step``, the one a class defines."""

    @torch.compiler.disable(recursive=False)
    @wraps(step)
    def training_step(self: DistillationMixin, *args: Any, **kwargs: Any) -> Any:
        return _run_step(self, step, args, kwargs)

    return training_step


@torch.compiler.disable(recursive=False)
def _run_step(module: DistillationMixin, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Return what ``step`` returns, with the total in place of the task's loss."""
    distillation = module.distillation
    if distillation is None or not distillation.wanted:
        return step(module, *args, **kwargs)
    if distillation.callback is None:
        raise RuntimeError("distillation was not set up: configure_callbacks must call super()")
    assert isinstance(distillation.callback, DistillationCallback)
    return distillation.callback.step(module, step, args, kwargs)
