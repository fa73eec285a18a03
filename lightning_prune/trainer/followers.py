"""Copies of a network that a LightningModule keeps by hand: mean teachers, momentum encoders, target networks.

Their update reads the parameters of network and copy in pairs, so a copy must lose the same channels at the same
moment. Averages that torch or Lightning keep are found without being named, see
:mod:`lightning_prune.trainer.weight_averaging`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.serialization.record import PruningRecord, rerooted
from lightning_prune.surgery.optimizer_state import CutParameter
from lightning_prune.trainer.training_state import target_of
from lightning_prune.trainer.weight_averaging import AveragedCopy, averaged_copies
from lightning_prune.utils.modules import declared, is_within, named_shapes, named_tensors

__all__ = [
    "AFTER_PRUNE",
    "Followers",
    "call_after_prune",
    "check_followers",
    "copies_by_name",
    "copies_to_cut",
    "cut_copies_",
    "has_hook",
    "own_record",
    "prunable_tensors",
    "resolve_followers",
    "unnamed_copies",
]

#: names of copies, or copy -> its original; None: nothing was said about copies
Followers = Sequence[str] | Mapping[str, str] | None
#: name of the method of a module that is called after each cut
AFTER_PRUNE = "on_after_prune"


def check_followers(followers: Followers) -> Followers:
    """Return ``followers``, or raise ValueError if they are neither names nor a mapping of names.

    Example:
        >>> check_followers(["teacher"])
        ['teacher']
    """
    if followers is None:
        return None
    names: list[Any] = list(followers) if isinstance(followers, Sequence | Mapping) else [None]
    originals = list(followers.values()) if isinstance(followers, Mapping) else []
    are_names = all(isinstance(name, str) and name for name in names + originals)
    if isinstance(followers, str) or not are_names:
        raise ValueError(
            f"followers must be a list of names of modules, or a mapping copy -> original, got {followers!r}"
        )
    return followers


def prunable_tensors(graph: ChannelGraph, submodule: str | None) -> set[str]:
    """Return the names, within the LightningModule, of all tensors that a cut of its ``submodule`` may reduce."""
    prefix = f"{submodule}." if submodule else ""
    return {
        prefix + name
        for name, dims in graph.bindings.items()
        if any(np.isin(units, graph.prunable).any() for units in dims.values())
    }


def resolve_followers(
    followers: Sequence[str] | Mapping[str, str], pl_module: L.LightningModule, prunable: Collection[str]
) -> dict[str, str]:
    """Return copy -> original for the names that a user gave, relative to the LightningModule.

    Args:
        followers: names of copies, or copy -> original.
        pl_module: holds both.
        prunable: names of the tensors that cuts may reduce, from :func:`prunable_tensors`.

    Raises:
        ValueError: a name matches no module, a copy is pruned itself, or it has no original of equal structure, or
            several.
    """
    pruned, originals = _with_tensors(pl_module, prunable), dict[str, str]()
    for name in followers:
        copy = target_of(pl_module, name)
        if name in pruned:
            raise ValueError(
                f"the follower {name!r} is a part of the network that is pruned; name that network by submodule=..."
            )
        given = [followers[name]] if isinstance(followers, Mapping) else []
        matches = [
            original
            for original in given or pruned
            if not _overlap(original, name)
            and named_shapes(target_of(pl_module, original)) == named_shapes(copy)
        ]
        if len(matches) != 1:
            raise ValueError(_mismatch(name, given, matches))
        originals[name] = matches[0]
    return originals


def _mismatch(name: str, given: Sequence[str], matches: Sequence[str]) -> str:
    if matches:
        names = " or of ".join(map(repr, matches))
        return f"{name!r} could be a copy of {names}: say which, by followers={{{name!r}: {matches[0]!r}}}"
    original = repr(given[0]) if given else "any part of the network that is pruned"
    return (
        f"the follower {name!r} does not have the structure of {original}: a copy that is cut along has tensors of "
        "the same names and shapes"
    )


def unnamed_copies(pl_module: L.LightningModule, prunable: Collection[str]) -> dict[str, str]:
    """Return copy -> original for modules that are not pruned but have the structure of a part that is.

    Left out are averages, which are cut along anyway, modules that share tensors with the original, single layers,
    and parts of copies that were found already.

    Args:
        pl_module: the LightningModule.
        prunable: names of the tensors that cuts may reduce, from :func:`prunable_tensors`.
    """
    pruned = _with_tensors(pl_module, prunable)
    originals = {_structure(module): name for name, module in reversed(pruned.items())}
    copies: dict[str, str] = {}
    closed: list[str] = []  # modules whose parts are not looked at
    for name, module in pl_module.named_modules():
        if name in pruned or any(is_within(name, outer) for outer in closed):
            continue
        original = originals.get(_structure(module))
        if isinstance(module, AveragedModel) or original is not None:
            closed.append(name)
        if original is not None and _num_layers(module) > 1 and not _share_tensors(module, pruned[original]):
            copies[name] = original
    return copies


def copies_to_cut(
    trainer: L.Trainer, pl_module: L.LightningModule, originals: Mapping[str, str]
) -> list[AveragedCopy]:
    """Return all copies that are cut along with the network: averages, followers, and followers within averages.

    Call this before the network is cut, like :func:`~lightning_prune.trainer.weight_averaging.averaged_copies`.

    Args:
        trainer: its callbacks may hold averages.
        pl_module: its LightningModule.
        originals: follower -> original.
    """
    averages = averaged_copies(trainer, pl_module)
    copies = {id(copy.module): copy for copy in averages}
    for root in (AveragedCopy(pl_module, ""), *averages):
        for name, original in originals.items():
            if (module := root.counterpart(name)) is not None:
                copies.setdefault(id(module), AveragedCopy(module, original))
    return list(copies.values())


def copies_by_name(pl_module: L.LightningModule, copies: Iterable[AveragedCopy]) -> dict[str, str]:
    """Return name -> original of those copies that are modules of ``pl_module`` itself."""
    names = {id(module): name for name, module in pl_module.named_modules()}
    return {names[id(copy.module)]: copy.original for copy in copies if id(copy.module) in names}


def cut_copies_(
    copies: Iterable[AveragedCopy],
    pl_module: L.LightningModule,
    record: PruningRecord,
    submodule: str | None,
) -> dict[str, CutParameter]:
    """Cut copies to ``record`` of the LightningModule's ``submodule``, which was cut already.

    Returns:
        A name -> the parameter, its shape before, and what survives, for optimizers that hold it.
    """
    cut: dict[str, CutParameter] = {}
    for number, copy in enumerate(copies):
        own = own_record(copy, pl_module, record, submodule)
        tensors = named_tensors(copy.module)
        shapes = {name: tensors[name].shape for name in own.kept}
        own.apply_(copy.module, verify=False)
        for name, dims in own.kept.items():
            cut[f"copy {number} of {copy.original}: {name}"] = CutParameter(tensors[name], shapes[name], dims)
    return cut


def own_record(
    copy: AveragedCopy, pl_module: L.LightningModule, record: PruningRecord, submodule: str | None
) -> PruningRecord:
    """Return the record of a copy for a cut of ``submodule``, without tensors that copy and original share."""
    original = pl_module.get_submodule(copy.original)
    return copy.record_for(record, submodule).without_tensors_of(copy.module, original)


def has_hook(pl_module: L.LightningModule, submodule: str | None) -> bool:
    """Return whether the LightningModule or its pruned submodule defines ``on_after_prune``."""
    return any(declared(module, AFTER_PRUNE) for module in (pl_module, target_of(pl_module, submodule)))


def call_after_prune(pl_module: L.LightningModule, submodule: str | None, record: PruningRecord) -> None:
    """Call ``on_after_prune(record)`` of the LightningModule and of the pruned submodule, where they define it.

    Names in the record are relative to the module whose method is called.
    """
    target = target_of(pl_module, submodule)
    if (hook := declared(pl_module, AFTER_PRUNE)) is not None:
        hook(rerooted(record, submodule or "", ""))
    if target is not pl_module and (hook := declared(target, AFTER_PRUNE)) is not None:
        hook(record)


def _structure(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple(sorted(named_shapes(module).items()))


def _num_layers(module: nn.Module) -> int:
    return sum(parameter.dim() > 1 for parameter in module.parameters())


def _share_tensors(one: nn.Module, other: nn.Module) -> bool:
    first, second = ({id(tensor) for tensor in named_tensors(module).values()} for module in (one, other))
    return not first.isdisjoint(second)


def _with_tensors(pl_module: nn.Module, tensors: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules that contain one of ``tensors``, given by qualified names, by their names."""
    parts = (name.split(".") for name in tensors)
    owners = {".".join(path[:depth]) for path in parts for depth in range(len(path))}
    return {name: module for name, module in pl_module.named_modules() if name in owners}


def _overlap(one: str, other: str) -> bool:
    return is_within(one, other) or is_within(other, one)
