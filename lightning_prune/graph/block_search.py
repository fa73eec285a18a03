"""Find the residual blocks of a network that may vanish: branches whose output is added to their own input.

Nothing is guessed from names or types: the flow of values of a recorded forward shows which operators a sum needs
only for the branch, and which modules run nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from lightning_prune.graph.branch_modules import Branch, branch_of, modules_of_branches
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.dataflow import Flow
from lightning_prune.graph.fixed_blocks import inline_parameters, reason_against, tensors_inside
from lightning_prune.graph.layer_costs import dense_trace_of
from lightning_prune.graph.residual_blocks import Place, ResidualBlock, ResidualBlocks
from lightning_prune.graph.trace import TraceError
from lightning_prune.graph.zeros import zero_values
from lightning_prune.tracing.recorder import record_forward
from lightning_prune.tracing.traceable import refusal_reason, unwrapped
from lightning_prune.utils.example_inputs import Example, as_example
from lightning_prune.utils.modules import is_within
from lightning_prune.utils.passing import is_passing

__all__ = ["blocks_of", "find_blocks", "residual_blocks"]


def residual_blocks(model: nn.Module, example: Any) -> ResidualBlocks:
    """Return the residual blocks of a network that may vanish, and the reasons why others may not.

    A block may vanish if its branch is added to the tensor that it was computed from, with the same shape, and if the
    modules of the branch do nothing else. In a transformer the attention and the MLP of a layer are two blocks.

    Args:
        model: the network; it is not changed.
        example: its input: a tensor, a tuple, or a dictionary of named ones.

    Raises:
        TraceError: the network cannot be recorded.

    Example:
        >>> import torch
        >>> from lightning_prune.classification.networks.cifar_resnet import CifarResNet
        >>> blocks = residual_blocks(CifarResNet(depth=14, width=4), torch.zeros(1, 1, 32, 32))
        >>> list(blocks)
        ['blocks.0', 'blocks.1', 'blocks.3', 'blocks.5']
        >>> blocks.fixed["blocks.2"]
        'its shortcut is computed by a layer, since the shape changes: it is not the input of the branch'
    """
    return find_blocks(model, as_example(example))


def blocks_of(graph: ChannelGraph) -> ResidualBlocks:
    """Return the residual blocks of the network of a graph, which are looked for once.

    Raises:
        ValueError: the graph was made by hand.
    """
    dense = dense_trace_of(graph)
    if dense.blocks is None:
        dense.blocks = find_blocks(dense.tracker.model, *dense.examples)
    return cast(ResidualBlocks, dense.blocks)


def find_blocks(model: nn.Module, *examples: Example) -> ResidualBlocks:
    """Do as :func:`residual_blocks` for several examples, each positional and named inputs."""
    if (reason := refusal_reason(model)) is not None:
        raise TraceError(reason)
    flows = _recorded(model, examples)
    found = ResidualBlocks(model, flows, examples)
    found.gone = [_gone(flow) for flow in flows]
    branches = [_branches(flow, gone) for flow, gone in zip(flows, found.gone, strict=True)]
    found.places = [
        {place: (each.add, each.stream) for place, each in of_flow.items() if isinstance(each, Branch)}
        for of_flow in branches
    ]
    _combine(found, branches)
    return found


def _recorded(model: nn.Module, examples: Sequence[Example]) -> list[Flow]:
    flows: list[Flow] = []
    errors: list[Exception] = []
    with unwrapped(model):
        for training in (False, True):
            for args, kwargs in examples:
                try:
                    flows.append(Flow(record_forward(model, args, kwargs, training), model))
                except Exception as error:
                    if is_passing(error):
                        raise
                    errors.append(error)
    if not flows:
        raise TraceError(f"the network raises on its example input: {errors[0]}") from errors[0]
    return flows


def _gone(flow: Flow) -> dict[int, int]:
    """Return additions one of whose operands is zero, since it comes from a branch that has vanished."""
    zeros = zero_values(flow)
    return {
        number: 1 - position
        for number, step in enumerate(flow.steps)
        if step.is_sum
        for position, value in enumerate(step.reads)
        if value in zeros and not (position == 0 and step.is_difference)
    }


def _branches(flow: Flow, gone: Mapping[int, int]) -> dict[Place, Branch | str]:
    """Return every addition of two tensors of one shape: its branch, or why it has none that may vanish."""
    counts: defaultdict[str, int] = defaultdict(int)
    found: dict[Place, Branch | str] = {}
    base = flow.live()
    for number, step in enumerate(flow.steps):
        if not step.is_addition:
            continue
        owner = step.call.module
        place = owner, counts[owner]
        counts[owner] += 1
        if number in base and number not in gone:
            found[place] = branch_of(flow, number, gone)
    return _without_nested(flow, found)


def _without_nested(flow: Flow, found: dict[Place, Branch | str]) -> dict[Place, Branch | str]:
    """Replace branches that contain others: those may vanish one by one."""
    adds = {each.add: place for place, each in found.items() if isinstance(each, Branch)}
    return {
        place: (
            "contains other blocks, which may vanish one by one"
            if isinstance(each, Branch) and any(add in each.operators for add in adds)
            else each
        )
        for place, each in found.items()
    }


def _combine(found: ResidualBlocks, branches: list[dict[Place, Branch | str]]) -> None:
    """Fill in the blocks on which all forwards agree."""
    places = list(dict.fromkeys(place for of_flow in branches for place in of_flow))
    per_owner: defaultdict[str, int] = defaultdict(int)
    for owner, number in places:  # without sums that are no blocks at all
        per_owner[owner] += any(of_flow.get((owner, number), "") != "" for of_flow in branches)
    for place in places:
        versions = [of_flow[place] for of_flow in branches if place in of_flow]
        reason = next((version for version in versions if isinstance(version, str)), None)
        if reason is not None:
            if reason:
                found.fixed[_unused(place[0] or f"addition {place[1]}", found)] = reason
            continue
        _add_block(found, place, [v for v in versions if isinstance(v, Branch)], per_owner[place[0]] == 1)


def _add_block(found: ResidualBlocks, place: Place, branches: Sequence[Branch], only_one: bool) -> None:
    modules, owner = modules_of_branches(branches, found.flows), place[0]
    largest = max(modules, key=lambda name: _num_elements(found.model, name), default=owner)
    adds_once = bool(owner) and only_one and all(is_within(name, owner) for name in modules)
    name = _unused(owner if adds_once else largest or "the network", found)
    tensors = tensors_inside(found.model, modules)
    inline = sorted(
        {each for branch in branches for each in inline_parameters(found.model, branch)} - set(tensors)
    )
    block = ResidualBlock(name, owner, tuple(modules), place, tuple(inline), tuple(tensors))
    reason = reason_against(found, block)
    if reason:
        found.fixed[name] = reason
    else:
        found.blocks[name] = block


def _unused(name: str, found: ResidualBlocks) -> str:
    """Return a name that no other block has: ``name``, with a number behind it if need be."""
    taken, number, candidate = {*found.blocks, *found.fixed}, 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name} #{number}"
    return candidate


def _num_elements(model: nn.Module, name: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
