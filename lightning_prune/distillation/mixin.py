"""Distillation for any LightningModule, through every cut (level 4).

``total = alpha_task * task + alpha * hinton + beta * attention + lambda_ * fsp``; the task's loss is what the
module's own ``training_step`` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import lightning as L
import torch

from lightning_prune.distillation.callback import DistillationCallback
from lightning_prune.distillation.config import Distillation

__all__ = [
    "Distillation",
    "DistillationMixin",
]


class DistillationMixin(L.LightningModule):
    """A LightningModule that learns from a teacher too. Write ``training_step`` as usual.

    Put it before other bases, and set :attr:`distillation`. Every part is logged as ``distill/<part>``. Needs
    automatic optimization.

    Example:
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
            cls.training_step = _distilled(cls.__dict__["training_step"])  # type: ignore[method-assign]

    @torch.compiler.disable(
        recursive=False
    )  # the module's own step may be compiled, what is around it is not
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """That of the next base, distilled."""
        return _taught(self, super().training_step.__func__, args, kwargs)  # type: ignore[attr-defined]

    def configure_callbacks(self) -> Any:
        """Those of the module, and the one that looks after the teacher."""
        given = super().configure_callbacks()
        own = [given] if isinstance(given, L.Callback) else list(given)
        if self.distillation is None or not self.distillation.wanted:
            return own
        if self.distillation.callback is None:
            self.distillation.callback = DistillationCallback(self.distillation)
        return [*own, self.distillation.callback]


def _distilled(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's own ``training_step``, distilled."""

    @torch.compiler.disable(recursive=False)
    @wraps(step)
    def training_step(self: DistillationMixin, *args: Any, **kwargs: Any) -> Any:
        return _taught(self, step, args, kwargs)

    return training_step


@torch.compiler.disable(recursive=False)
def _taught(module: DistillationMixin, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The total instead of the task's loss, for the outermost ``training_step`` of a class and its bases."""
    distillation = module.distillation
    if distillation is None or not distillation.wanted:
        return step(module, *args, **kwargs)
    if distillation.callback is None:
        raise RuntimeError("distillation was not set up: configure_callbacks must call super()")
    assert isinstance(distillation.callback, DistillationCallback)
    return distillation.callback.step(module, step, args, kwargs)
