"""Notes of cuts, kept in the modules that were cut, so that the record of all cuts travels with them.

Every module that owns a tensor or an attribute that a cut has changed carries a note: surviving indices and dense
shape of each tensor, dense and present value of each attribute. Notes survive deep copies, pickling, and a new
place in another network. They are strings of JSON: a file that contains the module needs nothing of this package,
and nothing that looks at the attributes of modules (tracing, scripting, copying) looks into them.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.utils.module_walk import named_modules
from lightning_prune.utils.modules import named_tensors
from lightning_prune.utils.named_sizes import read_size

__all__ = ["NOTE", "CutNote", "cut_again", "note_cut", "notes_of"]

#: the attribute of a module that holds its note
NOTE = "_lightning_prune_cuts"
#: tensor -> dimension -> surviving indices
Kept = Mapping[str, Mapping[int, list[int]]]


@dataclass
class CutNote:
    """The cuts of one module so far; names are those of its own parameters, buffers and attributes.

    Attributes:
        kept: tensor -> dimension -> surviving indices of the dense tensor.
        shapes: tensor -> its dense shape.
        attributes: attribute -> its dense value, its present value.
        frozen: parameters without elements that required gradients before.
        values: buffer that no file holds (``persistent=False``) -> its dense bytes, in base 64.
    """

    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: dict[str, list[Any]] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module) -> CutNote | None:
        """Read the note of a module; None if it has none."""
        text = vars(module).get(NOTE)
        if text is None:
            return None
        note = cls(**json.loads(text))
        note.kept = {name: {int(d): i for d, i in dims.items()} for name, dims in note.kept.items()}
        return note

    def write(self, module: nn.Module) -> None:
        """Store the note in a module."""
        vars(module)[NOTE] = json.dumps(vars(self))


def note_cut(
    model: nn.Module,
    kept: Kept,
    shapes: Mapping[str, list[int]],
    attributes: Mapping[str, Any],
    before: CutState,
) -> None:
    """Note a cut of ``model``, which was made already, in all of its modules that own what was cut.

    Args:
        model: the smaller network.
        kept: as in a :class:`~lightning_prune.PruningRecord`, relative to the network before this cut.
        shapes: likewise.
        attributes: likewise.
        before: what :meth:`CutState.of` returned before the cut.
    """
    tensors = named_tensors(model)
    cuts = {id(tensors[name]): name for name in kept}
    paths: dict[str, list[str]] = {}
    for path in attributes:
        owner, _, attribute = path.rpartition(".")
        paths.setdefault(owner, []).append(attribute)
    for module_name, module in named_modules(model):
        own = {
            local: cuts[id(tensor)] for local, tensor in stored_tensors(module).items() if id(tensor) in cuts
        }
        if own or module_name in paths:
            note = CutNote.of(module) or CutNote()
            for local, name in own.items():
                note.shapes.setdefault(local, list(shapes[name]))
                note.kept[local] = cut_again(note.kept.get(local, {}), kept[name])
                if name in before.trainable and not tensors[name].requires_grad:
                    note.frozen = sorted({*note.frozen, local})
                if name in before.values:
                    note.values.setdefault(local, before.values[name])
            for attribute in paths.get(module_name, ()):
                path = f"{module_name}.{attribute}".lstrip(".")
                dense, _ = note.attributes.get(attribute, (before.attributes[path], None))
                note.attributes[attribute] = [dense, attributes[path]]
            note.write(module)


@dataclass(frozen=True)
class CutState:
    """The values of a network before a cut that its notes have to keep.

    Attributes:
        attributes: path of an attribute -> its value.
        trainable: names of parameters that require gradients.
        values: name of a buffer that no file holds -> its bytes, in base 64.
    """

    attributes: Mapping[str, Any]
    trainable: Collection[str]
    values: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str], paths: Iterable[str]) -> CutState:
        """Read the state of the tensors ``names`` and the attributes ``paths``, before they are cut."""
        tensors, modules = named_tensors(model), dict(named_modules(model))
        names = list(names)
        attributes = {}
        for path in paths:
            owner, _, attribute = path.rpartition(".")
            attributes[path] = read_size(modules[owner], attribute)
        trainable = {name for name in names if tensors[name].requires_grad}
        values = {name: _bytes_of(tensors[name]) for name in names if not _is_persistent(modules, name)}
        return cls(attributes, trainable, values)


def notes_of(model: nn.Module, without: Iterable[nn.Module] = ()) -> Iterator[tuple[str, nn.Module, CutNote]]:
    """Yield name, module and note of all modules in ``model`` from which something was cut.

    Args:
        model: the network.
        without: parts of it that are left out.
    """
    left_out = {id(module) for part in without for module in part.modules()}
    for name, module in named_modules(model):
        if id(module) not in left_out and (note := CutNote.of(module)) is not None:
            yield name, module, note


def cut_again(first: Mapping[int, list[int]], second: Mapping[int, list[int]]) -> dict[int, list[int]]:
    """Return the surviving indices of a tensor after two cuts; those of the second count what the first has left.

    Example:
        >>> cut_again({0: [0, 2, 3]}, {0: [0, 2], 1: [1]})
        {0: [0, 3], 1: [1]}
    """
    kept = {dim: list(indices) for dim, indices in first.items()}
    for dim, indices in second.items():
        before = kept.get(dim)
        kept[dim] = list(indices) if before is None else [before[index] for index in indices]
    return kept


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and buffers, as they are stored: parametrised weights are not computed."""
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def dense_values(note: CutNote, name: str, like: Tensor) -> Tensor:
    """Return the dense values of a buffer that no file holds, with the type and device of ``like``."""
    data = torch.frombuffer(bytearray(b64decode(note.values[name])), dtype=torch.uint8)
    return data.view(like.dtype).reshape(note.shapes[name]).to(like.device)


def _bytes_of(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return b64encode(flat.view(torch.uint8).numpy().tobytes()).decode()


def _is_persistent(modules: Mapping[str, nn.Module], name: str) -> bool:
    owner, _, local = name.rpartition(".")
    return local not in modules[owner]._non_persistent_buffers_set
