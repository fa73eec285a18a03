"""Find the residual blocks of a network that may vanish: branches whose output is added to their own input.

Nothing is guessed from names or types: the flow of values of a recorded forward shows which operators a sum needs
only for the branch, and which modules run nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import groupby
from typing import Any, cast

from torch import nn

from lightning_prune.graph.branch_modules import Branch, branch_of, modules_of_branches, replacements_of
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.dataflow import Flow
from lightning_prune.graph.layer_costs import dense_trace_of
from lightning_prune.graph.pins import pinned_tensors
from lightning_prune.graph.skipped_owners import skipped_owners
from lightning_prune.graph.trace import TraceError
from lightning_prune.graph.zeros import zero_values
from lightning_prune.tracing.recorder import record_forward
from lightning_prune.tracing.traceable import refusal_reason, unwrapped
from lightning_prune.utils.example_inputs import Example, as_example
from lightning_prune.utils.module_walk import named_parameters
from lightning_prune.utils.modules import is_within, named_tensors, tensors_by_all_names
from lightning_prune.utils.passing import is_passing
from lightning_prune.utils.vanished import within_any

__all__ = ["ResidualBlock", "ResidualBlocks", "blocks_of", "find_blocks", "residual_blocks"]

#: module whose forward adds, number among the additions of that module: the same in every forward
Place = tuple[str, int]


@dataclass(frozen=True)
class ResidualBlock:
    """A branch that is added to its own input, and can vanish.

    Attributes:
        name: of the block: the module that adds, if it adds once, else the largest module of the branch.
        owner: name of the module whose forward adds.
        modules: modules that belong only to the branch, none within another.
        place: where the addition is: its module, and its number among that module's additions.
        frozen: parameters that only the branch reads, but by the code around its modules: they stay, untrained,
            unless the whole of that module vanishes.
        tensors: parameters and buffers of ``modules``.

    Example:
        >>> import torch
        >>> from lightning_prune.classification.networks.cifar_resnet import CifarResNet
        >>> blocks = residual_blocks(CifarResNet(depth=8, width=4), torch.zeros(1, 1, 16, 16))
        >>> blocks.blocks["blocks.0"].modules
        ('blocks.0.bn1', 'blocks.0.bn2', 'blocks.0.conv1', 'blocks.0.conv2')
    """

    name: str
    owner: str
    modules: tuple[str, ...]
    place: Place
    frozen: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


@dataclass
class ResidualBlocks:
    """The residual blocks of a network: those that may vanish, and why the others may not.

    Attributes:
        model: the network.
        flows: its recorded forwards.
        examples: inputs of these.
        blocks: name -> block, in the order of the forward.
        fixed: name of a block -> why it cannot vanish.
        places: of each forward, place -> the operator that adds, for blocks that may vanish.
        gone: of each forward, additions of branches that have vanished already.

    Iterating over it gives the names of the blocks that may vanish.

    Example:
        >>> import torch
        >>> from lightning_prune.classification.networks.cifar_resnet import CifarResNet
        >>> blocks = residual_blocks(CifarResNet(depth=14, width=4), torch.zeros(1, 1, 16, 16))
        >>> blocks.stages()  # of one shape each
        [['blocks.0', 'blocks.1'], ['blocks.3'], ['blocks.5']]
    """

    model: nn.Module
    flows: list[Flow]
    examples: tuple[Example, ...] = ()
    blocks: dict[str, ResidualBlock] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    places: list[dict[Place, tuple[int, int]]] = field(default_factory=list)
    gone: list[dict[int, int]] = field(default_factory=list)

    def severed(self, names: Iterable[str]) -> list[dict[int, int]]:
        """Return, for each forward, the additions of some blocks and of those that are gone -> operand that stays."""
        return self._severed_at([self.blocks[name].place for name in names])

    def _severed_at(self, places: Sequence[Place]) -> list[dict[int, int]]:
        return [
            gone | {found[place][0]: found[place][1] for place in places if place in found}
            for found, gone in zip(self.places, self.gone, strict=True)
        ]

    def replacements(self, names: Sequence[str], whole: bool = True) -> dict[str, dict[str, Any]]:
        """Return what takes the place of which module when some blocks vanish.

        Args:
            names: of the blocks.
            whole: whether a module of which nothing but the shortcut is left is replaced as a whole.

        Returns:
            Name of a module -> description, see :func:`~lightning_prune.utils.vanished.replacement`.
        """
        chosen = [self.blocks[name] for name in names]
        found: dict[str, dict[str, Any]] = {}
        if whole:
            found = skipped_owners(self.model, self.flows, self.severed(names), {b.owner for b in chosen})
        for owner, what in found.items():
            what["blocks"] = [block.name for block in chosen if is_within(block.owner, owner)]
        for block in chosen:
            if not any(is_within(block.owner, owner) for owner in found):
                adds = [places.get(block.place) for places in self.places]
                parts = replacements_of(self.flows, adds, block.modules)
                next(what for what in parts.values() if what["as"] == "zero")["blocks"] = [block.name]
                found |= parts
        skipped = [name for name, what in found.items() if what["as"] == "skipped"]
        return {  # what lies within a module that goes as a whole goes with it
            name: what
            for name, what in found.items()
            if not any(name != other and is_within(name, other) for other in skipped)
        }

    def stages(self) -> list[list[str]]:
        """Return the blocks that may vanish, in runs with sums of one shape."""
        runs = groupby(self.blocks, key=self._shape_of)
        return [list(names) for _, names in runs]

    def _shape_of(self, name: str) -> tuple[int, ...]:
        place = self.blocks[name].place
        for flow, places in zip(self.flows, self.places, strict=True):
            if place in places:
                return tuple(flow.steps[places[place][0]].call.outputs[0].shape)
        return ()

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError unless all of these are blocks that may vanish; say why, or what was meant."""
        for name in names:
            if name in self.fixed:
                raise ValueError(f"the block {name!r} cannot vanish: {self.fixed[name]}")
            if name not in self.blocks:
                near = get_close_matches(name, self.blocks, n=3, cutoff=0.3) or list(self.blocks)[:3]
                hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "there are none"
                raise ValueError(f"no residual block {name!r}: {hint}")

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)


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
    tensors = _tensors_inside(found.model, modules)
    inline = sorted({each for branch in branches for each in _inline(found.model, branch)} - set(tensors))
    block = ResidualBlock(name, owner, tuple(modules), place, tuple(inline), tuple(tensors))
    reason = _reason_against(found, block, branches)
    if reason:
        found.fixed[name] = reason
    else:
        found.blocks[name] = block


def _reason_against(found: ResidualBlocks, block: ResidualBlock, branches: Sequence[Branch]) -> str:
    """Return why the modules of a block cannot go; "" if they can."""
    names = block.modules
    if not any(is_weight(found.model, name) for name in (*block.tensors, *block.frozen)):
        return "its branch has no layer of its own"
    if (unread := _unread(found, block.tensors)) is not None:
        return f"no example reaches {unread!r}"
    if (shared := _shared_tensor(found.model, names)) is not None:
        return f"{shared!r} is shared with a module that stays"
    reasons = {id(tensor): reason for tensor, reason in pinned_tensors(found.model)}
    tensors = named_tensors(found.model)
    pinned = next(
        (reasons[id(tensors[name])] for name in block.tensors if id(tensors.get(name)) in reasons), None
    )
    if pinned is not None:
        return f"it must stay: {pinned}"
    adds = [places.get(block.place) for places in found.places]
    try:
        whole = skipped_owners(
            found.model, found.flows, found._severed_at([block.place]), {block.owner} if block.owner else ()
        )
        if not whole:
            replacements_of(found.flows, adds, names)
    except ValueError as error:
        return str(error)
    inline_weight = next((name for name in block.frozen if is_weight(found.model, name)), None)
    if inline_weight is not None and not whole:
        return f"{inline_weight!r} is read by the code of the block itself, which cannot be changed"
    return ""


def _inline(model: nn.Module, branch: Branch) -> set[str]:
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


def _unread(found: ResidualBlocks, names: Sequence[str]) -> str | None:
    """Return a parameter that no operator of any forward reads."""
    read = {
        value[1] for flow in found.flows for step in flow.steps for value in step.reads if value[0] == "model"
    }
    tensors = dict(named_parameters(found.model))
    return next((name for name in names if name in tensors and id(tensors[name]) not in read), None)


def _shared_tensor(model: nn.Module, modules: Sequence[str]) -> str | None:
    """Return a parameter or buffer of the modules that another module holds, too."""
    inside = {id(tensor): name for name, tensor in tensors_by_all_names(model) if within_any(name, modules)}
    outside = {id(tensor) for name, tensor in tensors_by_all_names(model) if not within_any(name, modules)}
    return next((name for key, name in inside.items() if key in outside), None)


def _tensors_inside(model: nn.Module, modules: Sequence[str]) -> list[str]:
    return [name for name in named_tensors(model) if within_any(name, modules)]


def _num_elements(model: nn.Module, name: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(name).parameters())


def _unused(name: str, found: ResidualBlocks) -> str:
    """Return a name that no other block has: ``name``, with a number behind it if need be."""
    taken, number, candidate = {*found.blocks, *found.fixed}, 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name} #{number}"
    return candidate
