"""Hooks of a LightningModule that make checkpoints fit a pruned network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_prune.serialization.carried_record import carried_record, dense_again_
from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.serialization.saved_network import CHECKPOINT_KEY, INTEGRITY, integrity_of
from lightning_prune.serialization.saving import (
    Part,
    check_weights,
    find_submodule,
    has_shapes_of,
    names_of_copies,
    shrink_,
)
from lightning_prune.trainer.followers import call_after_prune, copies_to_cut, has_hook, own_record
from lightning_prune.utils.modules import named_tensors

#: Former class name of a callback -> its name today. Lightning stores the state of a callback under its class name.
OLD_STATE_KEYS = {"Teaching": "DistillationCallback"}


@dataclass(frozen=True)
class _Part:
    """A network that a checkpoint describes: what was pruned, or a copy that was cut along.

    Attributes:
        module: the network.
        record: what is removed from it in the checkpoint.
        copies: copies within it, which are parts of their own.
        inside: whether its weights belong to the LightningModule.
    """

    module: nn.Module
    record: PruningRecord
    copies: Sequence[nn.Module]
    inside: bool


def resize_with_copies_(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    saved: Mapping[str, Any],
    weights: Mapping[str, Any],
    copies: Mapping[str, str],
) -> bool:
    """Cut the network, and all copies that were cut along, to the record of a checkpoint, before its weights load.

    A network that was cut already takes on any other size: it gets its dense shapes back first. If a dense module is
    cut, its ``on_after_prune`` is called with the record.

    Args:
        trainer: its callbacks may hold averaged copies.
        pl_module: is resized in place.
        saved: this package's entry of the checkpoint: ``record`` (None: nothing was removed), ``submodule`` and
            ``copies``.
        weights: the ``state_dict`` of the checkpoint.
        copies: copies in the module that were cut along so far -> their originals.

    Returns:
        Whether the network was resized.

    Raises:
        RecordError: weights and module do not fit; the module is as it was.
    """
    parts = _parts(trainer, pl_module, saved, copies)
    present = [carried_record(part.module, part.copies) for part in parts]
    if all(now.cuts == part.record.cuts for now, part in zip(present, parts, strict=True)):
        return False
    if not any(present):
        return _cut_dense_(pl_module, parts, saved.get("submodule"), weights)
    _check_grown(pl_module, parts, present, weights)
    with dense_again_([(part.module, part.copies) for part in parts]):
        check_weights(pl_module, _of_module(parts), weights, strict=False)
        for part in parts:
            part.record.apply_(part.module, verify=False)
    if has_hook(pl_module, saved.get("submodule")):
        _check_hook(trainer)
    return True


def _parts(
    trainer: L.Trainer, pl_module: L.LightningModule, saved: Mapping[str, Any], present: Mapping[str, str]
) -> list[_Part]:
    """Return the network and its copies, each with its record in the checkpoint."""
    plain = saved.get("record")
    record = PruningRecord() if plain is None else PruningRecord.from_dict(plain)
    submodule, names = saved.get("submodule"), names_of_copies(saved)
    target = find_submodule(pl_module, submodule or "")
    for name in names:
        find_submodule(pl_module, name)
    modules = dict(pl_module.named_modules())
    names = {name: original for name, original in present.items() if name in modules} | names
    copies = copies_to_cut(trainer, pl_module, names)
    inside, own = {id(module) for module in modules.values()}, {id(module) for module in target.modules()}
    within = [copy.module for copy in copies if id(copy.module) in own]
    parts = [_Part(target, record, within, True)]
    for copy in copies:
        cut = own_record(copy, pl_module, record, submodule)
        parts.append(_Part(copy.module, cut, (), id(copy.module) in inside))
    return parts


def _of_module(parts: Sequence[_Part]) -> list[Part]:
    return [(part.module, part.record) for part in parts if part.inside]


def _cut_dense_(
    pl_module: L.LightningModule, parts: Sequence[_Part], submodule: str | None, weights: Mapping[str, Any]
) -> bool:
    """Cut a dense module; return False if it was built with the sizes of the checkpoint."""
    target, record = parts[0].module, parts[0].record
    is_dense = not has_shapes_of(target, record)
    if is_dense and not has_hook(pl_module, submodule):
        check_weights(pl_module, _of_module(parts), weights, strict=False)
    for part in parts:
        shrink_(part.module, part.record)
    if is_dense:
        call_after_prune(pl_module, submodule, record)
    return is_dense


def _check_grown(
    pl_module: L.LightningModule,
    parts: Sequence[_Part],
    present: Sequence[PruningRecord],
    weights: Mapping[str, Any],
) -> None:
    """Raise RecordError if a tensor has to grow and the checkpoint has no values for it.

    Args:
        pl_module: holds the parts that are inside.
        parts: the network and its copies.
        present: what is removed from each of them now.
        weights: the ``state_dict`` of the checkpoint.
    """
    persistent = pl_module.state_dict(keep_vars=True)
    in_file = {id(tensor) for name, tensor in persistent.items() if name in weights}
    absent = {id(tensor) for tensor in persistent.values()} - in_file
    missing = [
        name
        for part, now in zip(parts, present, strict=True)
        if part.inside
        for name, tensor in named_tensors(part.module).items()
        if name in now.kept and id(tensor) in absent
    ]
    if missing:
        raise RecordError(
            f"the network was cut since, and the checkpoint has no values for {missing[0]!r}, which was removed in "
            "part; load it into a module that is built anew"
        )


def _check_hook(trainer: L.Trainer) -> None:
    """Warn, or raise RecordError if training continues: tensors of the user's own cannot grow again."""
    message = (
        "the module was cut further than the checkpoint, and what its on_after_prune has cut keeps its size: build "
        "the module anew to train on"
    )
    if trainer.state.fn == TrainerFn.FITTING:
        raise RecordError(message)
    rank_zero_warn(message)


def saved_entry(pl_module: L.LightningModule, key: str) -> Mapping[str, Any]:
    """Return an entry that :func:`add_to_checkpoints` has given to the module; empty if there is none."""
    added = _added(pl_module)
    return {} if added is None else added.args[1].get(key, {})


def fits_module(pl_module: L.LightningModule, weights: Mapping[str, Any]) -> bool:
    """Return whether weights have the present shapes of a module, where it has tensors of their names."""
    try:
        check_weights(pl_module, [], weights, strict=False)
    except RecordError:
        return False
    return True


def set_load_hook(pl_module: L.LightningModule, hook: Callable[[dict[str, Any]], None] | None) -> None:
    """Have ``hook(checkpoint)`` called before the module's own ``on_load_checkpoint``; None removes the hook.

    Lightning calls the hooks of callbacks only after it has loaded the weights, which is too late to cut.
    """
    original = vars(pl_module).pop("on_load_checkpoint", None)
    if isinstance(original, _LoadHook):
        original = original.replaced
    if hook is not None:
        original = _LoadHook(pl_module, original, hook)
    if original is not None:
        vars(pl_module)["on_load_checkpoint"] = original


class _LoadHook:
    """Call a function, and then the ``on_load_checkpoint`` of a module; copies of the module only have the latter.

    Args:
        pl_module: the module.
        replaced: what the instance had as ``on_load_checkpoint``; None: nothing, only the method of its class.
        hook: the function.
    """

    def __init__(
        self, pl_module: L.LightningModule, replaced: Callable[..., Any] | None, hook: Callable[..., Any]
    ) -> None:
        self.pl_module, self.replaced, self.hook = pl_module, replaced, hook

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.hook(checkpoint)
        (self.replaced or partial(type(self.pl_module).on_load_checkpoint, self.pl_module))(checkpoint)

    def __reduce__(self) -> Any:
        if self.replaced is not None:
            return _same, (self.replaced,)
        # Called while the copy is still empty, so that this finds the method of its class.
        return getattr, (self.pl_module, "on_load_checkpoint")


def _same(value: Any) -> Any:
    return value


def add_to_checkpoints(pl_module: L.LightningModule, entries: Mapping[str, Any]) -> None:
    """Have all further checkpoints of the module contain ``entries``, unless they have such keys already.

    For checkpoints with weights only, and for those after training, Lightning calls no hook of a callback, but
    calls ``on_save_checkpoint`` of the module. A second call replaces the entries of the first.
    """
    # What an earlier call has added is replaced, not wrapped: its entries are out of date.
    added = _added(pl_module)
    original = pl_module.on_save_checkpoint if added is None else added.args[0]
    vars(pl_module)["on_save_checkpoint"] = partial(_save_with, original, dict(entries))


def _added(pl_module: L.LightningModule) -> partial[None] | None:
    """Return the hook that :func:`add_to_checkpoints` has given to the module, if any."""
    hook = vars(pl_module).get("on_save_checkpoint")
    return hook if isinstance(hook, partial) and hook.func is _save_with else None


def _save_with(
    original: Callable[[dict[str, Any]], None], entries: Mapping[str, Any], checkpoint: dict[str, Any]
) -> None:
    for name, value in entries.items():
        checkpoint.setdefault(name, value)
    original(checkpoint)
    pruned = checkpoint.get(CHECKPOINT_KEY)
    if isinstance(pruned, Mapping) and "state_dict" in checkpoint:
        # This is the last hook: nothing changes the weights any more.
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
