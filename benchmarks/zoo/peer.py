"""What torch-pruning does to one network in its default use: half of every group by magnitude, one step.

It has no oracle of its own. We log the groups that it says it prunes, set the same filters of the dense
network to zero (or what reads them), and compare, as for ours. Where a pruned filter meets statistics across
channels that is no oracle; then a forward and a backward that run count as passed.
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

__all__ = ["measure"]

Gone = list[tuple[str, int, list[int], bool]]
#: (module, name of torch-pruning's function, indices at the time) for everything it cut, in order
Log = list[tuple[nn.Module | nn.Parameter, str, list[int]]]


def measure(network: Network) -> dict[str, Any]:
    """Build the dependency graph, prune one step; plain values."""
    _warm_up()
    torch.manual_seed(0)
    model = awake_(randomise_(network.build())).eval()
    dense = copy.deepcopy(model)
    example = torch.randn(1, 3, network.size, network.size)
    seconds = Seconds()
    names = _names(model)
    try:
        with peak_memory() as peak:
            log = _prune(model, example, network.classes, seconds)
    except Exception as raised:
        return {**_raised("raised", raised), "wall": seconds.wall, "cpu": seconds.cpu}
    found: dict[str, Any] = {"wall": seconds.wall, "cpu": seconds.cpu, "peak_mb": peak.megabytes}
    found["share"] = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
    try:
        return {**found, **_judge(dense, model, network, log, names)}
    except Exception as raised:
        return {**found, **_raised("broken", raised)}


def _raised(status: str, raised: Exception) -> dict[str, Any]:
    return {"status": status, "reason": f"{type(raised).__name__}: {raised}"[:300]}


def _warm_up() -> None:
    toy = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)).eval()
    _prune(toy, torch.zeros(1, 3, 8, 8), 2, Seconds())


def _prune(model: nn.Module, example: Tensor, classes: int, seconds: Seconds) -> Log:
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
            log += [(dep.target.module, dep.handler.__name__, list(indices)) for dep, indices in group]
            group.prune()
    return log


def _outputs(model: nn.Module, classes: int) -> list[nn.Module]:
    """The layers that make the classes, as torch-pruning's guide ignores them."""
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
    gone = list(_original_indices(dense, log, names))
    if not _tells_all(dense, pruned, gone):
        return {"status": "passed", "oracle": "forward and backward only (its log is not the whole cut)"}
    if _meets_statistics(dense, x[:1], gone):
        return {"status": "passed", "oracle": "forward and backward only (statistics across channels)"}
    return _verdict(dense, pruned, gone, x)


def _tells_all(dense: nn.Module, pruned: nn.Module, gone: Gone) -> bool:
    """Whether the indices account for every dimension that a filter was taken from."""
    lost: dict[tuple[str, int], int] = {}
    for name, dim, indices, reads in gone:
        if not reads:
            lost[name, dim] = lost.get((name, dim), 0) + len(indices)
    after = dict(pruned.named_parameters())
    return all(
        name in after and parameter.shape[0] - after[name].shape[0] == lost.get((name, 0), 0)
        for name, parameter in dense.named_parameters()
        if (name, 0) in lost or parameter.dim() == 1
    )


def _verdict(dense: nn.Module, pruned: nn.Module, gone: Gone, x: Tensor) -> dict[str, Any]:
    dead = error(_zeroed(dense, gone, reads=False), pruned, x)
    consumers = error(_zeroed(dense, gone, reads=True), pruned, x)
    right = min(dead, consumers) < TOLERANCE
    status = "passed" if right else "wrong"
    return {"status": status, "oracle": "dead filters, zeroed consumers", "dead": dead, "zeroed": consumers}


def _original_indices(
    dense: nn.Module, log: Log, names: dict[int, str]
) -> Iterator[tuple[str, int, list[int], bool]]:
    """Parameter, dimension, its indices in the dense network, and whether they are read (not made) there."""
    parameters = dict(dense.named_parameters())
    alive: dict[tuple[str, bool], np.ndarray] = {}
    for target, function, indices in log:
        name = names.get(id(target))
        if name is None:
            continue
        reads = "in_channels" in function and function != "prune_out_channels"
        for parameter, dim in _bound(target, name, parameters, reads):
            left = alive.setdefault((parameter, reads), np.arange(parameters[parameter].shape[dim]))
            local = [index for index in indices if index < len(left)]
            yield parameter, dim, left[local].tolist(), reads
            alive[parameter, reads] = np.delete(left, local)


def _bound(
    target: nn.Module | nn.Parameter, name: str, parameters: dict[str, nn.Parameter], reads: bool
) -> Iterator[tuple[str, int]]:
    """The parameters of a target and the dimension that its channels run along; those of one read or made."""
    if isinstance(target, nn.Parameter):
        if name in parameters:
            yield name, max(range(parameters[name].dim()), key=lambda dim: parameters[name].shape[dim])
        return
    for part in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
        parameter = f"{name}.{part}".lstrip(".")
        if parameter in parameters and not (reads and parameters[parameter].dim() < 2):
            swapped = isinstance(target, nn.modules.conv._ConvTransposeNd)
            two = parameters[parameter].dim() > 1
            depthwise = reads and isinstance(target, nn.Conv2d) and target.groups > 1
            if not depthwise:
                yield parameter, int(two and (reads != swapped))


def _meets_statistics(dense: nn.Module, example: Tensor, gone: Gone) -> bool:
    try:
        graph = trace(dense, example)
    except Exception:
        return True  # unknown: no oracle
    for parameter, dim, indices, reads in gone:
        units = graph.bindings.get(parameter, {}).get(dim)
        if units is None and not reads:
            return True
        if units is not None and np.isin(units[indices], graph.statistics_units).any():
            return True
    return False


def _zeroed(dense: nn.Module, gone: Gone, reads: bool) -> nn.Module:
    twin = copy.deepcopy(dense)
    parameters = dict(twin.named_parameters())
    for name, dim, indices, reading in gone:
        if reading == reads:
            parameters[name].data.index_fill_(dim, torch.tensor(indices, dtype=torch.int64), 0)
    return twin
