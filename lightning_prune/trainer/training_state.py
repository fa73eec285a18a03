"""The state of a training: its target, its callbacks, its last epoch; and output beside the progress bar."""

from __future__ import annotations

from difflib import get_close_matches

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_prune.trainer.lightning_internals import is_unwrapped_compiled
from lightning_prune.utils.modules import has_compiled_parts

__all__ = ["target_of"]


@rank_zero_only
def print_line(trainer: L.Trainer, line: str) -> None:
    """Print a line without breaking the progress bar, on rank 0."""
    bar = trainer.progress_bar_callback
    enabled = bar is not None and getattr(bar, "is_enabled", True)
    (bar.print if bar is not None and enabled else print)(line)


def target_of(pl_module: L.LightningModule, submodule: str | None) -> nn.Module:
    """Return the module to prune: ``submodule`` by its qualified name, or the whole module.

    Raises:
        ValueError: there is no submodule of that name.
    """
    if submodule is None:
        return pl_module
    modules = dict(pl_module.named_modules())
    if submodule not in modules:
        similar = get_close_matches(submodule, modules, n=3, cutoff=0.4) or list(modules)[1:4]
        raise ValueError(f"no submodule {submodule!r}; did you mean {' or '.join(map(repr, similar))}?")
    return modules[submodule]


def is_compiled(pl_module: L.LightningModule) -> bool:
    """Return whether ``torch.compile`` was applied to the module or a part of it."""
    return is_unwrapped_compiled(pl_module) or has_compiled_parts(pl_module)


def is_last_epoch(trainer: L.Trainer, epoch: int) -> bool:
    """Return whether no training follows ``epoch``.

    A resumed run may ask for an epoch before the current one, whose cut is still to be made.
    """
    return trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epoch + 1
