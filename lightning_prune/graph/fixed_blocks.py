"""Why a residual block cannot vanish: what its modules hold, share, or are needed for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_prune.graph.branch_modules import Branch, replacements_of
from lightning_prune.graph.pins import pinned_tensors
from lightning_prune.graph.residual_blocks import ResidualBlock, ResidualBlocks
from lightning_prune.graph.skipped_owners import skipped_owners
from lightning_prune.graph.zeros import zero_values
from lightning_prune.utils.module_walk import named_parameters
from lightning_prune.utils.modules import named_tensors, tensors_by_all_names, within_any

__all__ = ["inline_parameters", "reason_against", "tensors_inside"]


def reason_against(found: ResidualBlocks, block: ResidualBlock) -> str:
    """Return why the modules of a block cannot go; "" if they can."""
    checks = _no_layer, _unread, _shared, _pinned, _irreplaceable
    return next((reason for check in checks if (reason := check(found, block))), "")


def _no_layer(found: ResidualBlocks, block: ResidualBlock) -> str:
    has_weight = any(is_weight(found.model, name) for name in (*block.tensors, *block.frozen))
    return "" if has_weight else "its branch has no layer of its own"


def _unread(found: ResidualBlocks, block: ResidualBlock) -> str:
    read = {
        value[1] for flow in found.flows for step in flow.steps for value in step.reads if value[0] == "model"
    }
    parameters = dict(named_parameters(found.model))
    unread = (name for name in block.tensors if name in parameters and id(parameters[name]) not in read)
    return next((f"no example reaches {name!r}" for name in unread), "")


def _shared(found: ResidualBlocks, block: ResidualBlock) -> str:
    tensors = [
        (id(tensor), name, within_any(name, block.modules))
        for name, tensor in tensors_by_all_names(found.model)
    ]
    outside = {key for key, _, inside in tensors if not inside}
    shared = (name for key, name, inside in tensors if inside and key in outside)
    return next((f"{name!r} is shared with a module that stays" for name in shared), "")


def _pinned(found: ResidualBlocks, block: ResidualBlock) -> str:
    reasons = {id(tensor): reason for tensor, reason in pinned_tensors(found.model)}
    tensors = named_tensors(found.model)
    pinned = (reasons[id(tensors[name])] for name in block.tensors if id(tensors.get(name)) in reasons)
    return next((f"it must stay: {reason}" for reason in pinned), "")


def _irreplaceable(found: ResidualBlocks, block: ResidualBlock) -> str:
    """Return why nothing can take the place of the modules, or of the code that reads weights by itself."""
    owners, adds = {block.owner} - {""}, [places.get(block.place) for places in found.places]
    try:
        if skipped_owners(found.model, found.flows, found.severed_at([block.place]), owners):
            return ""
        stand_ins = replacements_of(found.flows, adds, block.modules)
    except ValueError as error:
        return str(error)
    for name in block.frozen:
        if is_weight(found.model, name):
            return f"{name!r} is read by the code of the block itself, which cannot be changed"
    zeros = [name for name, what in stand_ins.items() if what["as"] == "zero"]
    for flow, add in zip(found.flows, adds, strict=True):
        if add and flow.steps[add[0]].reads[1 - add[1]] not in zero_values(flow, zeros):
            return "what its modules return reaches the addition only together with other values"
    return ""


def inline_parameters(model: nn.Module, branch: Branch) -> set[str]:
    """Return the parameters that only the operators of the branch read."""
    names = {id(tensor): name for name, tensor in named_parameters(model)}
    steps = branch.flow.steps
    read, others = (
        {value[1] for number in numbers for value in steps[number].reads if value[0] == "model"}
        for numbers in (branch.operators, branch.remaining)
    )
    return {names[key] for key in read - others if key in names}


def is_weight(model: nn.Module, name: str) -> bool:
    """Return whether a parameter has two dimensions of more than one element."""
    tensor = named_tensors(model).get(name)
    return isinstance(tensor, nn.Parameter) and sum(size > 1 for size in tensor.shape) > 1


def tensors_inside(model: nn.Module, modules: Sequence[str]) -> list[str]:
    """Return the names of the parameters and buffers of some modules."""
    return [name for name in named_tensors(model) if within_any(name, modules)]
