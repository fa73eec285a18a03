"""What Lightning's loop needs around a cut: inputs, wrappers, checkpoints (level 4)."""

from __future__ import annotations

from difflib import get_close_matches

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

__all__ = ["target_of"]


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The callbacks of a trainer; its own attribute has no type."""
    return trainer.callbacks  # type: ignore[attr-defined]


@rank_zero_only
def say(trainer: L.Trainer, line: str) -> None:
    """Print a line, past the progress bar."""
    bar = trainer.progress_bar_callback
    shown = bar is not None and getattr(bar, "is_enabled", True)
    (bar.print if bar is not None and shown else print)(line)


def target_of(pl_module: L.LightningModule, submodule: str | None) -> nn.Module:
    """The module to prune.

    Raises:
        ValueError: there is no submodule of that name.
    """
    if submodule is None:
        return pl_module
    found = dict(pl_module.named_modules())
    if submodule not in found:
        near = get_close_matches(submodule, found, n=3, cutoff=0.4) or list(found)[1:4]
        raise ValueError(f"no submodule {submodule!r}; did you mean {' or '.join(map(repr, near))}?")
    return found[submodule]


def is_compiled(pl_module: L.LightningModule) -> bool:
    """Whether ``torch.compile`` was applied to the module or a part of it."""
    return pl_module._compiler_ctx is not None or any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in pl_module.modules()
    )


def is_last_epoch(trainer: L.Trainer, epoch: int) -> bool:
    """Whether no training follows ``epoch``: not always the current one, a resumed run may still owe a cut."""
    return trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch + 1
