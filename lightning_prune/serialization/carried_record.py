"""The record that a pruned network carries, and its way back to the dense shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.serialization.cut_notes import NOTE, CutNote, dense_values, notes_of, stored_tensors
from lightning_prune.serialization.integrity import fingerprint
from lightning_prune.serialization.load_errors import explain_load_errors
from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.utils.modules import cut_shape, drop_caches_, named_tensors, set_data
from lightning_prune.utils.named_sizes import write_size
from lightning_prune.utils.vanished import (
    original_of,
    restore_,
    train_again_,
    untrained_parameters,
    vanished_modules,
)

__all__ = ["carried_record", "dense_again_", "regrow_"]

explain_load_errors()


def carried_record(model: nn.Module, without: Iterable[nn.Module] = ()) -> PruningRecord:
    """Return the record of all cuts made in ``model``, relative to the dense network; empty if there were none.

    It travels with the modules: a network that :func:`~lightning_prune.load_pruned`,
    :func:`~lightning_prune.prune_` or a callback has cut carries it, and so does a copy of it, or a part of it in
    another network.

    Args:
        model: the network.
        without: parts of it that are left out.

    Raises:
        RecordError: a tensor no longer has the shape that the last cut left.

    Example:
        >>> linear = PruningRecord({"weight": {0: [0, 2]}}, {"weight": [3, 4]}).apply_(nn.Linear(4, 3, bias=False))
        >>> carried_record(nn.Sequential(linear)).kept
        {'0.weight': {0: [0, 2]}}
    """
    without = list(without)
    cuts: dict[int, tuple[CutNote, str]] = {}
    attributes: dict[str, Any] = {}
    for module_name, module, note in notes_of(model, without):
        tensors = stored_tensors(module)
        cuts.update({id(tensors[name]): (note, name) for name in note.kept if name in tensors})
        prefix = f"{module_name}." if module_name else ""
        attributes |= {prefix + name: value for name, (_, value) in note.attributes.items()}
    record = PruningRecord(attributes=attributes)
    for name, tensor in named_tensors(model).items():
        if id(tensor) in cuts:
            note, local = cuts[id(tensor)]
            _check_shape(name, tensor, note, local)
            record.kept[name], record.shapes[name] = note.kept[local], note.shapes[local]
    dense = fingerprint(model)
    record.dense = {name: [dtype, record.shapes.get(name, shape)] for name, (dtype, shape) in dense.items()}
    left_out = {id(part) for root in without for part in root.modules()}
    for name, module, what in vanished_modules(model):
        if id(module) not in left_out:
            record.vanished[name] = what
            part = original_of(module)
            assert part is not None
            inner = carried_record(part)
            record.dense |= {f"{name}.{tensor}": entry for tensor, entry in inner.dense.items()}
    for name, module in untrained_parameters(model):
        if id(module) not in left_out:
            record.vanished[name] = {"as": "untrained"}
    return record


def regrow_(model: nn.Module, without: Iterable[nn.Module] = ()) -> None:
    """Give a network its dense shapes back, in place. What was removed is zero: load weights into it next.

    ``Parameter`` objects stay the same and get larger data; their gradients become None. Buffers that no file holds
    get their dense values back.

    Args:
        model: the network.
        without: parts of it that stay as they are.

    Raises:
        RecordError: a tensor no longer has the shape that the last cut left; nothing is changed.

    Example:
        >>> linear = PruningRecord({"weight": {0: [0, 2]}}, {"weight": [3, 4]}).apply_(nn.Linear(4, 3, bias=False))
        >>> regrow_(linear)
        >>> linear.weight.shape, linear.weight[1].abs().sum().item()
        (torch.Size([3, 4]), 0.0)
    """
    without = list(without)
    carried_record(model, without)
    _bring_back_(model, without)
    for _, module, note in list(notes_of(model, without)):
        for name, tensor in stored_tensors(module).items():
            if (
                name in note.kept and list(tensor.shape) != note.shapes[name]
            ):  # a shared one has grown already
                set_data(tensor, _grown(tensor, note, name))
            if name in note.frozen:
                tensor.requires_grad_(True)
        for attribute, (dense, _) in note.attributes.items():
            write_size(module, attribute, dense)
        vars(module).pop(NOTE)
    drop_caches_(model)


def _bring_back_(model: nn.Module, without: Sequence[nn.Module]) -> None:
    """Put vanished modules back in their places, with zeros for their weights."""
    left_out = {id(part) for root in without for part in root.modules()}
    device = next((tensor.device for tensor in named_tensors(model).values()), torch.device("cpu"))
    while names := [name for name, module, _ in vanished_modules(model) if id(module) not in left_out]:
        restore_(model, names[0], device)  # others may have vanished within it before
    train_again_(model, left_out)


@contextmanager
def dense_again_(parts: Sequence[tuple[nn.Module, Sequence[nn.Module]]]) -> Iterator[None]:
    """Give networks their dense shapes back; cut them as before if the block raises.

    Args:
        parts: each network, with the parts of it that are left out.
    """
    before = [(part, without, carried_record(part, without)) for part, without in parts]
    for part, without, _ in before:
        regrow_(part, without)
    try:
        yield
    except BaseException:
        for part, without, record in before:
            regrow_(part, without)
            record.apply_(part, verify=False)
        raise


def _grown(tensor: Tensor, note: CutNote, name: str) -> Tensor:
    """Return the tensor in its dense shape, with the present values where they survived."""
    kept, data = note.kept[name], tensor.detach()
    if name in note.values:
        grown = dense_values(note, name, tensor)
        present = [kept.get(dim, range(size)) for dim, size in enumerate(grown.shape)]
        grids = torch.meshgrid(
            [torch.tensor(list(each), dtype=torch.int64) for each in present], indexing="ij"
        )
        grown[grids] = data
        return grown
    for dim, indices in kept.items():
        shape = [note.shapes[name][dim] if d == dim else size for d, size in enumerate(data.shape)]
        index = torch.tensor(indices, dtype=torch.int64, device=data.device)
        data = data.new_zeros(shape).index_copy_(dim, index, data)
    channels_last = tensor.dim() == 4 and not tensor.is_contiguous()
    return data.contiguous(memory_format=torch.channels_last) if channels_last else data.contiguous()


def _check_shape(name: str, tensor: Tensor, note: CutNote, local: str) -> None:
    """Raise RecordError unless the tensor has the shape that its cuts have left."""
    dense = note.shapes[local]
    expected = cut_shape(dense, note.kept[local])
    if list(tensor.shape) != expected:
        raise RecordError(
            f"{name!r} has shape {list(tensor.shape)}, but pruning left {expected} of {dense}: it was replaced "
            "since; build the network anew, and load its weights by load_pruned"
        )
