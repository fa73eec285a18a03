"""Let residual blocks vanish from a network; that is proven right, or rolled back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_prune.graph.block_search import blocks_of, find_blocks
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.residual_blocks import ResidualBlocks
from lightning_prune.graph.trace import TraceError
from lightning_prune.serialization.integrity import fingerprint
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.surgery.optimizer_state import drop_state_
from lightning_prune.surgery.vanish_proof import VanishingError, prove_vanished
from lightning_prune.utils.modules import named_tensors
from lightning_prune.utils.vanished import release_, replace_modules_

__all__ = ["vanish_modules_of_blocks_"]


def vanish_modules_of_blocks_(
    model: nn.Module, graph: ChannelGraph, names: Sequence[str], optimizers: Sequence[Optimizer] = ()
) -> PruningRecord:
    """Replace the modules of residual blocks, prove that right, and drop what only they had.

    The caller rolls back if this raises.

    Args:
        model: the network.
        graph: of the network as it is.
        names: of the blocks, see :func:`~lightning_prune.residual_blocks`.
        optimizers: parameters that vanish are removed from them, with their state.

    Raises:
        VanishingError: the network without the blocks computes something else.
        ValueError: there is no such block, or it cannot vanish.
    """
    blocks = blocks_of(graph)
    blocks.check(names)
    dense, before = fingerprint(model), named_tensors(model)
    vanished = _replaced(model, blocks, names)
    untrained = sorted(name for each in names for name in blocks.blocks[each].frozen)
    remaining = named_tensors(model)
    untrained = [name for name in untrained if name in remaining]
    vanished |= {name: {"as": "untrained"} for name in untrained}
    replace_modules_(model, {name: vanished[name] for name in untrained})
    after = {id(tensor) for tensor in remaining.values()}
    gone = [
        tensor for tensor in before.values() if id(tensor) not in after and isinstance(tensor, nn.Parameter)
    ]
    for optimizer in optimizers:
        drop_state_(optimizer, gone)
    for tensor in gone:
        tensor.grad = None
    return PruningRecord(dense=dense, vanished=vanished)


def _replaced(model: nn.Module, blocks: ResidualBlocks, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Replace the modules, first whole blocks where that is possible, and return what took whose place."""
    error: Exception | None = None
    for vanished in _variants(blocks, names):
        originals = replace_modules_(model, vanished)
        try:
            small = find_blocks(model, *blocks.examples)
            prove_vanished(blocks.flows, blocks.severed(names), small.flows, small.gone, list(vanished))
        except (VanishingError, TraceError) as raised:
            error = error or raised
            put_back_(model, originals)
            continue
        for original in originals.values():
            release_(model, original)
        return vanished
    culprits = [name for name in names if len(names) > 1 and not _can_vanish(model, blocks, name)] or list(
        names
    )
    failure = VanishingError(f"{', '.join(culprits)} cannot vanish: {error}")
    failure.blocks = tuple(culprits)
    raise failure from error


def _variants(blocks: ResidualBlocks, names: Sequence[str]) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield what may take the place of the modules, the fastest first.

    Whole modules first; then only those of the branches; then, of these, zeros of the shape of the input, where the
    code behind a branch reads its shape, or single zeros, where a module returns less than its input; then zeros for
    all of them, where the code between them works in place.
    """
    yield blocks.replacements(names)
    if all(blocks.blocks[name].modules for name in names):
        parts = blocks.replacements(names, whole=False)
        yield parts
        shaped = {
            name: {**what, "full": True} if what["as"] == "zero" else what for name, what in parts.items()
        }
        if shaped != parts:
            yield shaped
        single = {
            name: {**what, "full": False} if what["as"] == "zero" else what for name, what in parts.items()
        }
        if single != parts:
            yield single
        yield {
            name: {**what, "as": "zero", "full": True} if what["as"] == "passed" else what
            for name, what in shaped.items()
        }


def _can_vanish(model: nn.Module, blocks: ResidualBlocks, name: str) -> bool:
    """Return whether a block can vanish on its own; the model is unchanged afterwards."""
    for vanished in _variants(blocks, [name]):
        originals = replace_modules_(model, vanished)
        try:
            small = find_blocks(model, *blocks.examples)
            prove_vanished(blocks.flows, blocks.severed([name]), small.flows, small.gone, list(vanished))
        except (VanishingError, TraceError):
            continue
        else:
            return True
        finally:
            put_back_(model, originals)
    return False


def put_back_(model: nn.Module, originals: dict[str, nn.Module]) -> None:
    """Put modules that were replaced back in their places."""
    for name, original in originals.items():
        new = model.get_submodule(name)
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child is new:
                    parent._modules[key] = original
