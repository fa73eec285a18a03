"""Networks that ``fully_shard`` (FSDP2) distributes over processes: gathered for a cut, and sharded again after it.

There is no public way back from ``fully_shard``; what it sets on modules is taken off here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_prune.surgery.optimizer_buffers import base_optimizers

__all__ = ["check_sharding", "is_sharded", "whole_network"]

_FLAGS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
ADVICE = "; take torch's fully_shard over one dimension of processes, or DistributedDataParallel"


def is_sharded(model: nn.Module) -> bool:
    """Return whether a part of the network is distributed over processes.

    Example:
        >>> is_sharded(nn.Linear(1, 1))
        False
    """
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def check_sharding(model: nn.Module) -> None:
    """Raise NotImplementedError if the network is distributed in a way that cannot be undone for a cut."""
    names = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    if names & {"FullyShardedDataParallel", "DeepSpeedEngine"}:
        raise NotImplementedError(
            f"FSDP1 and DeepSpeed keep parameters in flat buffers that cannot be cut{ADVICE}"
        )
    if not is_sharded(model):
        return
    units = _units(model)
    if not units or _managed_parameters(units) != {
        id(p) for p in model.parameters() if hasattr(p, "full_tensor")
    }:
        raise NotImplementedError(
            f"parameters are distributed by tensor parallelism, which cannot be cut{ADVICE}"
        )
    for unit in units:
        unit.check()


@dataclass
class _Unit:
    """What one call of ``fully_shard`` has distributed."""

    modules: tuple[nn.Module, ...]
    state: Any

    @property
    def group(self) -> Any:
        """The parameters, and how they are distributed; None if the modules have none of their own."""
        return next(iter(self.state._fsdp_param_groups), None)

    def check(self) -> None:
        """Raise NotImplementedError if it cannot be distributed again by the same arguments."""
        groups = self.state._fsdp_param_groups
        sharded = [parameter.sharded_param for group in groups for parameter in group.fsdp_params]
        is_plain = all(placement.is_shard(0) for each in sharded for placement in each.placements)
        sizes = {group.mesh_info.mesh.ndim for group in groups}
        policies = {type(group.offload_policy).__name__ for group in groups}
        if len(groups) > 1 or not is_plain or sizes - {1} or policies - {"OffloadPolicy"}:
            raise NotImplementedError(
                "parameters are sharded over several dimensions of processes, along another dimension than the "
                f"first, or offloaded to the CPU, which cannot be done again after a cut{ADVICE}"
            )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments by which ``fully_shard`` distributes the modules again."""
        arguments: dict[str, Any] = {"mp_policy": self.state._mp_policy}
        if self.group is not None:
            after = self.group.post_forward_mesh_info
            same = after is not None and after.shard_mesh_size == self.group.mesh_info.shard_mesh_size
            size = False if after is None else True if same else after.shard_mesh_size
            arguments |= {"mesh": self.group.mesh_info.mesh}
            arguments |= {} if self.state._auto_reshard_after_forward else {"reshard_after_forward": size}
        return arguments

    def take_off_(self) -> None:
        """Take hooks, classes and notes of ``fully_shard`` off the modules."""
        from torch.distributed import _composable_state
        from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

        self.state._pre_forward_hook_handle.remove()
        self.state._post_forward_hook_handle.remove()
        for group in self.state._fsdp_param_groups:
            for handles in (
                group._module_to_pre_save_state_dict_hook_handle,
                group._module_to_pre_load_state_dict_hook_handle,
            ):
                for handle in handles.values():
                    handle.remove()
        for module in self.modules:
            module.__class__ = type(module).__mro__[2]  # FSDP<name>, FSDPModule, the class itself
            _composable_state._module_state_mapping.pop(module, None)
            for key in (STATE_KEY, REGISTRY_KEY):
                vars(module).pop(key, None)


def _units(model: nn.Module) -> list[_Unit]:
    """Return what each call of ``fully_shard`` has distributed, outer modules before inner ones."""
    units: dict[int, _Unit] = {}
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            state = module._get_fsdp_state()  # type: ignore[operator]
            units.setdefault(id(state), _Unit(tuple(state._modules), state))
    return list(units.values())


def _managed_parameters(units: Sequence[_Unit]) -> set[int]:
    groups = [group for unit in units for group in unit.state._fsdp_param_groups]
    return {id(parameter.sharded_param) for group in groups for parameter in group.fsdp_params}


@contextmanager
def whole_network(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> Iterator[None]:
    """Gather a sharded network and the state of its optimizers for the block, in every process, and shard them again.

    A network that is not sharded stays as it is. Within the block the network has plain parameters, and none of the
    hooks of ``fully_shard``; after it, sharded ones of the sizes that they have then. They are new objects, which
    the optimizers get in place of the former ones. Gradients are dropped.

    Args:
        model: the network, or a module that holds it.
        optimizers: all that hold its parameters.

    Raises:
        NotImplementedError: it is distributed in another way.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> with whole_network(net):
        ...     net.weight.shape
        torch.Size([1, 1])
    """
    check_sharding(model)
    if not is_sharded(model):
        yield
        return
    units = _units(model)
    for unit in units:
        for module in unit.modules:
            module.reshard()  # type: ignore[operator]
    gathered = _replace_(model, _gathered(model))
    for unit in units:
        unit.take_off_()
    for module in model.modules():
        for flag in _FLAGS:
            vars(module).pop(flag, None)
    _rebind_(optimizers, gathered, _full)
    try:
        yield
    finally:
        _shard_again_(model, optimizers, units)


def _gathered(model: nn.Module) -> dict[Tensor, nn.Parameter]:
    """Return each sharded parameter -> its whole value in every process."""
    sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "full_tensor")]
    return {p: nn.Parameter(_full(p.detach(), None), p.requires_grad) for p in sharded}


def _replace_(model: nn.Module, parameters: dict[Tensor, nn.Parameter]) -> dict[Tensor, nn.Parameter]:
    """Put parameters in the place of others, shared ones in all their places."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in parameters:
                module._parameters[name] = parameters[parameter]
    return parameters


def _shard_again_(model: nn.Module, optimizers: Sequence[Optimizer], units: Sequence[_Unit]) -> None:
    from torch.distributed.fsdp import fully_shard

    names = dict(model.named_parameters())
    for parameter in names.values():
        parameter.data = parameter.data.contiguous()
    for unit in reversed(units):  # inner modules first
        fully_shard(unit.modules[0] if len(unit.modules) == 1 else list(unit.modules), **unit.arguments())
    sharded = dict(model.named_parameters())
    _rebind_(optimizers, {parameter: sharded[name] for name, parameter in names.items()}, _distributed)


def _full(value: Tensor, parameter: Tensor | None) -> Tensor:
    """Return the whole value of a distributed tensor, as a tensor of its own."""
    return value.full_tensor().clone() if hasattr(value, "full_tensor") else value


def _distributed(value: Tensor, parameter: Tensor | None) -> Tensor:
    """Return an entry of an optimizer's state distributed like its parameter, if it has the parameter's shape."""
    if parameter is None or not hasattr(parameter, "placements") or value.shape != parameter.shape:
        return value
    return distributed.tensor.distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def _rebind_(optimizers: Sequence[Optimizer], parameters: dict[Tensor, Any], convert: Any) -> None:
    """Have optimizers hold other parameters, and convert the state that they keep of them."""
    for optimizer in {
        id(each): each for outer in optimizers for each in (outer, *base_optimizers(outer))
    }.values():
        for group in optimizer.param_groups:
            group["params"] = [parameters.get(parameter, parameter) for parameter in group["params"]]
        for old, new in parameters.items():
            if old in optimizer.state:
                state = optimizer.state.pop(old)
                optimizer.state[new] = {
                    key: convert(value, new) if isinstance(value, torch.Tensor) else value
                    for key, value in state.items()
                }
