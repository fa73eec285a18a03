"""Hooks of a LightningModule that make checkpoints fit a pruned network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L

from lightning_prune.serialization.record import PruningRecord
from lightning_prune.serialization.saved_network import CHECKPOINT_KEY, INTEGRITY, integrity_of
from lightning_prune.serialization.saving import (
    check_weights,
    find_submodule,
    has_shapes_of,
    names_of_copies,
    shrink_,
)
from lightning_prune.trainer.followers import call_after_prune, copies_to_cut, has_hook, own_record

#: Former class name of a callback -> its name today. Lightning stores the state of a callback under its class name.
OLD_STATE_KEYS = {"Teaching": "DistillationCallback"}


def shrink_with_copies_(
    trainer: L.Trainer, pl_module: L.LightningModule, saved: Mapping[str, Any], weights: Mapping[str, Any]
) -> PruningRecord:
    """Cut the network, and all copies that were cut along, to the record of a checkpoint, before its weights load.

    If that changes the network, ``on_after_prune`` of the module is called with the record.

    Args:
        trainer: its callbacks may hold averaged copies.
        pl_module: is cut in place.
        saved: this package's entry of the checkpoint: ``record``, ``submodule`` and ``copies``.
        weights: the ``state_dict`` of the checkpoint.

    Returns:
        The record of the checkpoint.

    Raises:
        RecordError: weights and module do not fit.
    """
    record, submodule = PruningRecord.from_dict(saved["record"]), saved["submodule"]
    target, names = find_submodule(pl_module, submodule or ""), names_of_copies(saved)
    for name in names:
        find_submodule(pl_module, name)
    copies = copies_to_cut(trainer, pl_module, names)
    parts = [(copy.module, own_record(copy, pl_module, record, submodule)) for copy in copies]
    is_dense = not has_shapes_of(target, record)
    if is_dense and not has_hook(pl_module, submodule):
        inside = {id(module) for module in pl_module.modules()}
        inner = [part for part in parts if id(part[0]) in inside]
        check_weights(pl_module, [(target, record), *inner], weights, strict=False)
    shrink_(target, record)
    for copy, own in parts:
        shrink_(copy, own)
    if is_dense:
        call_after_prune(pl_module, submodule, record)
    return record


def set_load_hook(pl_module: L.LightningModule, hook: Callable[[dict[str, Any]], None] | None) -> None:
    """Have ``hook(checkpoint)`` called before the module's own ``on_load_checkpoint``; None removes the hook.

    Lightning calls the hooks of callbacks only after it has loaded the weights, which is too late to cut.
    """
    pl_module.__dict__.pop("on_load_checkpoint", None)
    if hook is not None:
        original = pl_module.on_load_checkpoint
        pl_module.on_load_checkpoint = _LoadHook(hook, original)  # type: ignore[method-assign]


class _LoadHook:
    """Calls a hook, then the module's own method. Copies and pickles of the module have the method only."""

    def __init__(
        self, hook: Callable[[dict[str, Any]], None] | None, original: Callable[[dict[str, Any]], None]
    ) -> None:
        self.hook, self.original = hook, original

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        if self.hook is not None:
            self.hook(checkpoint)
        self.original(checkpoint)

    def __getstate__(self) -> dict[str, Any]:
        return {"hook": None, "original": self.original}


def add_to_checkpoints(pl_module: L.LightningModule, entries: Mapping[str, Any]) -> None:
    """Have all further checkpoints of the module contain ``entries``, unless they have such keys already.

    For checkpoints with weights only, and for those after training, Lightning calls no hook of a callback, but
    calls ``on_save_checkpoint`` of the module. A second call replaces the entries of the first.
    """
    hook = vars(pl_module).get("on_save_checkpoint")
    # A partial of an earlier call is replaced, not wrapped: its entries are out of date.
    original = hook.args[0] if isinstance(hook, partial) else pl_module.on_save_checkpoint
    pl_module.on_save_checkpoint = partial(_save_with, original, dict(entries))  # type: ignore[method-assign]


def _save_with(
    original: Callable[[dict[str, Any]], None], entries: Mapping[str, Any], checkpoint: dict[str, Any]
) -> None:
    for name, value in entries.items():
        checkpoint.setdefault(name, value)
    original(checkpoint)
    pruned = checkpoint.get(CHECKPOINT_KEY)
    if (
        isinstance(pruned, Mapping) and "state_dict" in checkpoint
    ):  # the last hook: nothing changes them any more
        checkpoint[CHECKPOINT_KEY] = {**pruned, INTEGRITY: integrity_of(checkpoint["state_dict"], pruned)}


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
