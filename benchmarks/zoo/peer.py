"""Prune one network with torch-pruning in its default use: half of every group by magnitude, in one step.

The result is compared with the same two oracles as ours. They come from the log of the groups that torch-pruning
prunes: the same filters of the dense network, or the weights that read them, are set to zero. The oracles do not hold
for filters that enter statistics across channels; there a network passes if a forward and a backward run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.common.memory import peak_memory
from benchmarks.zoo.networks import Network
from benchmarks.zoo.ours import TOLERANCE, Seconds, awake_
from lightning_prune import trace
from lightning_prune.testing import error, randomise_
from lightning_prune.tracing.calls import tensors_in

__all__ = ["measure", "prune", "warm_up"]

#: removed indices: (parameter, dimension, indices in the dense network, whether the dimension is an input)
Removed = list[tuple[str, int, list[int], bool]]
#: (module, name of torch-pruning's function, indices before this step) of each step, in order
Log = list[tuple[nn.Module | nn.Parameter, str, list[int]]]


def measure(network: Network) -> dict[str, Any]:
    """Build the dependency graph, prune one step, check the result; return the row of the network."""
    warm_up()
    torch.manual_seed(0)
    model = awake_(randomise_(network.build())).eval()
    dense = copy.deepcopy(model)
    example = torch.randn(1, 3, network.size, network.size)
    seconds = Seconds()
    names = _names(model)
    try:
        with peak_memory() as peak:
            log = prune(model, example, network.classes, seconds)
    except Exception as failure:
        return {**_failure("raised", failure), "wall": seconds.wall, "cpu": seconds.cpu}
    row: dict[str, Any] = {"wall": seconds.wall, "cpu": seconds.cpu, "peak_mb": peak.megabytes}
    row["share"] = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
    try:
        return {**row, **_judge(dense, model, network, log, names)}
    except Exception as failure:
        return {**row, **_failure("broken", failure)}


def _failure(status: str, failure: Exception) -> dict[str, Any]:
    return {"status": status, "reason": f"{type(failure).__name__}: {failure}"[:300]}


def warm_up() -> None:
    """Prune a tiny network, so that imports and caches of the first call are not part of the times."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)).eval()
    prune(net, torch.zeros(1, 3, 8, 8), 2, Seconds())


def prune(model: nn.Module, example: Tensor, classes: int, seconds: Seconds, logged: bool = True) -> Log:
    """Build the dependency graph and prune half of every group; return the log, which is empty unless ``logged``."""
    log: Log = []
    with seconds.of("build"):
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=_outputs(model, classes),
        )
    with seconds.of("step"):
        for group in pruner.step(interactive=True):
            if logged:
                log += [(dep.target.module, dep.handler.__name__, list(indices)) for dep, indices in group]
            group.prune()
    return log


def _outputs(model: nn.Module, classes: int) -> list[nn.Module]:
    """Return the layers that output the classes; torch-pruning's guide excludes them from pruning."""
    return [
        module
        for module in model.modules()
        if classes in (getattr(module, "out_features", None), getattr(module, "out_channels", None))
    ]


def _names(model: nn.Module) -> dict[int, str]:
    return {
        **{id(module): name for name, module in model.named_modules()},
        **{id(parameter): name for name, parameter in model.named_parameters()},
    }


def _judge(
    dense: nn.Module, pruned: nn.Module, network: Network, log: Log, names: dict[int, str]
) -> dict[str, Any]:
    if not log:
        return {"status": "nothing", "reason": "removed nothing"}
    x = torch.randn(2, 3, network.size, network.size)
    sizes = [out.shape for out in tensors_in(dense(x))]
    outputs = tensors_in(pruned(x))
    if [out.shape for out in outputs] != sizes:
        return {"status": "broken", "reason": "the outputs have other shapes"}
    torch.stack([out.sum() for out in outputs if out.requires_grad]).sum().backward()
    removed = list(_original_indices(dense, log, names))
    if not _is_complete(dense, pruned, removed):
        return {"status": "passed", "oracle": "forward and backward only (its log is not the whole cut)"}
    if _enters_statistics(dense, x[:1], removed):
        return {"status": "passed", "oracle": "forward and backward only (statistics across channels)"}
    return _verdict(dense, pruned, removed, x)


def _is_complete(dense: nn.Module, pruned: nn.Module, removed: Removed) -> bool:
    """Return whether the indices explain the new size of every dimension that lost a filter."""
    counts: dict[tuple[str, int], int] = {}
    for name, dim, indices, reads in removed:
        if not reads:
            counts[name, dim] = counts.get((name, dim), 0) + len(indices)
    after = dict(pruned.named_parameters())
    return all(
        name in after and parameter.shape[0] - after[name].shape[0] == counts.get((name, 0), 0)
        for name, parameter in dense.named_parameters()
        if (name, 0) in counts or parameter.dim() == 1
    )


def _verdict(dense: nn.Module, pruned: nn.Module, removed: Removed, x: Tensor) -> dict[str, Any]:
    dead = error(_zeroed(dense, removed, reads=False), pruned, x)
    consumers = error(_zeroed(dense, removed, reads=True), pruned, x)
    right = min(dead, consumers) < TOLERANCE
    status = "passed" if right else "wrong"
    return {"status": status, "oracle": "dead filters, zeroed consumers", "dead": dead, "zeroed": consumers}


def _original_indices(
    dense: nn.Module, log: Log, names: dict[int, str]
) -> Iterator[tuple[str, int, list[int], bool]]:
    """Yield the removed indices in the numbering of the dense network, see ``Removed``.

    The log numbers the channels that are left at each step; ``alive`` maps these numbers to the original ones.
    """
    parameters = dict(dense.named_parameters())
    alive: dict[tuple[str, bool], np.ndarray] = {}
    for target, function, indices in log:
        name = names.get(id(target))
        if name is None:
            continue
        reads = "in_channels" in function and function != "prune_out_channels"
        for parameter, dim in _dimensions(target, name, parameters, reads):
            left = alive.setdefault((parameter, reads), np.arange(parameters[parameter].shape[dim]))
            local = [index for index in indices if index < len(left)]
            yield parameter, dim, left[local].tolist(), reads
            alive[parameter, reads] = np.delete(left, local)


def _dimensions(
    target: nn.Module | nn.Parameter, name: str, parameters: dict[str, nn.Parameter], reads: bool
) -> Iterator[tuple[str, int]]:
    """Yield the parameters of a target with the dimension of its input (``reads``) or output channels."""
    if isinstance(target, nn.Parameter):
        if name in parameters:
            yield name, max(range(parameters[name].dim()), key=lambda dim: parameters[name].shape[dim])
        return
    for part in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
        parameter = f"{name}.{part}".lstrip(".")
        if parameter in parameters and not (reads and parameters[parameter].dim() < 2):
            swapped = isinstance(target, nn.modules.conv._ConvTransposeNd)
            depthwise = reads and isinstance(target, nn.Conv2d) and target.groups > 1
            if not depthwise:
                yield parameter, int(parameters[parameter].dim() > 1 and (reads != swapped))


def _enters_statistics(dense: nn.Module, example: Tensor, removed: Removed) -> bool:
    try:
        graph = trace(dense, example)
    except Exception:
        return True  # not known, so the oracles cannot be trusted
    for parameter, dim, indices, reads in removed:
        units = graph.bindings.get(parameter, {}).get(dim)
        if units is None and not reads:
            return True
        if units is not None and np.isin(units[indices], graph.statistics_units).any():
            return True
    return False


def _zeroed(dense: nn.Module, removed: Removed, reads: bool) -> nn.Module:
    twin = copy.deepcopy(dense)
    parameters = dict(twin.named_parameters())
    for name, dim, indices, reading in removed:
        if reading == reads:
            parameters[name].data.index_fill_(dim, torch.tensor(indices, dtype=torch.int64), 0)
    return twin
