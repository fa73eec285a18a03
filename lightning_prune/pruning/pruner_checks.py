"""Checks of a network that anybody's training loop trains, before it is pruned and before each cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lightning_prune.criteria.layer_metrics import LayerMetrics
from lightning_prune.pruning.session import PruningSession
from lightning_prune.surgery.sharding import check_sharding, is_sharded
from lightning_prune.utils.modules import named_shapes

__all__ = [
    "check_copies",
    "check_moment",
    "check_not_sharded",
    "check_observer",
    "check_one_device",
    "check_unchanged",
    "unwrapped",
]

WRAPPERS = (DataParallel, DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wraps, or ``model`` itself.

    Raises:
        ValueError: it is wrapped for several devices.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> unwrapped(net) is net
        True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, WRAPPERS):
        raise ValueError(
            f"give the Pruner the network itself, model.module, instead of {type(model).__name__}: the wrapper keeps "
            "the sizes from before a cut. Wrap the network anew after each cut, in a function for on_cut; of "
            "DataParallel, which runs copies of the network, take DistributedDataParallel's place"
        )
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, nn.Module) else model


def check_not_sharded(model: nn.Module, what: str) -> None:
    """Raise ValueError if the network is sharded already; NotImplementedError if it can never be cut."""
    check_sharding(model)
    if is_sharded(model):
        raise ValueError(
            f"{what} before fully_shard distributes the network, and build the optimizer after it: gathering the "
            "network now would leave an optimizer behind that holds its former parameters"
        )


def check_observer(model: nn.Module, session: PruningSession) -> None:
    """Raise NotImplementedError, and observe nothing, if statistics need parameters that are sharded."""
    if is_sharded(model) and not isinstance(session.observer, LayerMetrics):
        session.stop_observing()
        raise NotImplementedError(
            "the criterion reads gradients of parameters, of which each process has a part only: take one of weights "
            "or activations, such as IPAD or L2, or DistributedDataParallel"
        )


def check_one_device(model: nn.Module) -> torch.device:
    """Return the device of the network.

    Raises:
        ValueError: it has several devices, or no tensor at all.

    Example:
        >>> check_one_device(nn.Linear(1, 1))
        device(type='cpu')
    """
    devices = sorted({str(tensor.device) for tensor in chain(model.parameters(), model.buffers())})
    if len(devices) != 1:
        raise ValueError(
            f"the network is on several devices ({', '.join(devices)}): move it to one before it is pruned, with "
            "device_map=None where a library spreads it"
            if devices
            else "the network has no parameters"
        )
    return torch.device(devices[0])


def check_moment(now: Any, last: int, unit: str) -> int:
    """Return the number of the epoch, or of steps, that has ended.

    Raises:
        ValueError: it is no number from 0, or below the ``last`` one.

    Example:
        >>> check_moment(3, 2, "epochs")
        3
    """
    try:
        number = int(now)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or number != now:
        raise ValueError(f"step() needs the number of {unit}, a whole number from 0, got {now!r}")
    if number < last:
        raise ValueError(
            f"step() was called for {number} {unit} after {last}: give it the number over the whole training, and "
            "where training resumes from an earlier checkpoint, load the state that the Pruner had then"
        )
    return number


def check_unchanged(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Raise ValueError if the tensors of the network are not those that were traced.

    Args:
        model: the network.
        shapes: name of each tensor -> its shape when the network was traced.
    """
    present = named_shapes(model)
    wrong = [name for name, shape in shapes.items() if present.get(name) != shape]
    if wrong:
        now = list(present[wrong[0]]) if wrong[0] in present else "missing"
        raise ValueError(
            f"the network was changed since it was traced: {wrong[0]!r} had shape {list(shapes[wrong[0]])}, and is "
            f"now {now} ({len(wrong)} tensors in all). The training loop has rebuilt it: make a new Pruner of the "
            "network that is trained, and load the state of this one; nothing was cut"
        )


def check_copies(model: nn.Module, copies: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the networks in ``copies``, out of their ``AveragedModel`` where they are in one.

    Raises:
        ValueError: one has other tensors than ``model``, or is ``model`` itself.

    Example:
        >>> net, average = nn.Linear(2, 1), AveragedModel(nn.Linear(2, 1))
        >>> check_copies(net, [average])
        [Linear(in_features=2, out_features=1, bias=True)]
    """
    networks = [copy.module if isinstance(copy, AveragedModel) else copy for copy in copies]
    for network in networks:
        if network is model or named_shapes(network) != named_shapes(model):
            raise ValueError(
                f"copies: a {type(network).__name__} is the network itself, or has other tensors than the network; a "
                "copy that is cut along (a moving average) has tensors of the same names and shapes; nothing was cut"
            )
    return networks
