"""NEW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L

from lightning_prune.serialization.record import PruningRecord
from lightning_prune.serialization.saving import check_weights, has_shapes_of, part_of, shrink_
from lightning_prune.trainer.weight_averaging import averaged_copies

#: Former class name of a callback -> its name today. Lightning stores the state of a callback under its class name.
OLD_STATE_KEYS = {"Teaching": "DistillationCallback"}


def shrink_with_averages_(
    trainer: L.Trainer, pl_module: L.LightningModule, saved: Mapping[str, Any], weights: Mapping[str, Any]
) -> PruningRecord:
    """Cut the network, and its averages, to the record of a checkpoint before the weights arrive."""
    record, submodule = PruningRecord.from_dict(saved["record"]), saved["submodule"]
    copies, target = averaged_copies(trainer, pl_module), part_of(pl_module, submodule or "")
    if not has_shapes_of(target, record):
        check_weights(pl_module, target, record, weights, strict=False)
    shrink_(target, record)
    for copy in copies:
        shrink_(copy.module, copy.part(record, submodule))
    return record


def set_load_hook(pl_module: L.LightningModule, first: Callable[[dict[str, Any]], None] | None) -> None:
    """Have ``first(checkpoint)`` called before the module's own ``on_load_checkpoint``; None takes it back.

    Of a callback's hooks, those for loading come only after the weights are in.
    """
    pl_module.__dict__.pop("on_load_checkpoint", None)
    if first is None:
        return
    own = pl_module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        first(checkpoint)
        own(checkpoint)

    pl_module.on_load_checkpoint = on_load_checkpoint  # type: ignore[method-assign]


def add_to_checkpoints(pl_module: L.LightningModule, extra: Mapping[str, Any]) -> None:
    """Have checkpoints of the module hold ``extra``, also those with weights only, and those after training.

    Lightning calls no hook of a callback for these.
    """
    saved = vars(pl_module).get("on_save_checkpoint")
    own = saved.args[0] if isinstance(saved, partial) else pl_module.on_save_checkpoint
    pl_module.on_save_checkpoint = partial(_save_along, own, dict(extra))  # type: ignore[method-assign]


def _save_along(
    own: Callable[[dict[str, Any]], None], extra: Mapping[str, Any], checkpoint: dict[str, Any]
) -> None:
    for name, value in extra.items():
        checkpoint.setdefault(name, value)
    own(checkpoint)


def rename_callback_states_(checkpoint: dict[str, Any]) -> None:
    """Move callback states saved under a former class name to the name of today, in place.

    Call it from the module's ``on_load_checkpoint``: Lightning warns about unknown callback states before it calls
    the hooks of callbacks. Callbacks without state, such as ``FrozenEpoch`` (once ``StillEpoch``), are never saved.

    Example:
        >>> checkpoint = {"callbacks": {"Teaching": {"started": True}}}
        >>> rename_callback_states_(checkpoint)
        >>> checkpoint
        {'callbacks': {'DistillationCallback': {'started': True}}}
    """
    states = checkpoint.get("callbacks", {})
    for old, new in OLD_STATE_KEYS.items():
        if old in states and new not in states:
            states[new] = states.pop(old)
