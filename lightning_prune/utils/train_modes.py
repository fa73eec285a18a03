"""Train and eval mode of networks whose ``train()`` does nothing but set a flag in each module."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from lightning_prune.utils.module_walk import PLAIN_TRAIN, modules_of

__all__ = ["mode_is_only_a_flag", "switch_modes_"]


def mode_is_only_a_flag(model: nn.Module) -> bool:
    """Return whether ``train()`` only sets ``training`` of the modules, a plain attribute of each."""
    modules = modules_of(model)
    kinds = {type(module) for module in modules}
    plain = all(_is_plain(kind) for kind in kinds)  # type: ignore[arg-type]
    return plain and not any("train" in vars(module) for module in modules)


@cache
def _is_plain(kind: Any) -> bool:
    assert isinstance(kind, type)
    if issubclass(kind, torch.jit.ScriptModule) or kind.__setattr__ is not nn.Module.__setattr__:
        return False
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return not any(
        "training" in vars(base)
        or "__getattribute__" in vars(base)
        or ("train" in vars(base) and (base.__module__, base.__qualname__) not in PLAIN_TRAIN)
        for base in bases
    )


def switch_modes_(model: nn.Module, training: bool) -> None:
    """Do what ``model.train(not training)`` and then ``model.train(training)`` do.

    Networks that cache what they compute in eval mode drop it when the mode changes. Where no module defines a
    ``train()`` of its own, only the flags are set, without a call for each module.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1))
        >>> switch_modes_(net, False)
        >>> net.training, net[0].training
        (False, False)
    """
    if _sets_flags_only(model):
        for module in modules_of(model):
            vars(module)["training"] = training
    else:
        model.train(not training)
        model.train(training)


def _sets_flags_only(model: nn.Module) -> bool:
    """Return whether every module has the ``train()`` of ``nn.Module``, which reaches all modules."""
    return mode_is_only_a_flag(model) and all(
        type(module).train is nn.Module.train and type(module).children is nn.Module.children
        for module in modules_of(model)
    )
