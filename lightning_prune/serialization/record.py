"""The pruning record: what surgery removed, as plain integers with which the same cut is made on a dense model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune.graph.pins import optional_parts
from lightning_prune.serialization.cut_notes import CutState, cut_again, note_cut
from lightning_prune.serialization.integrity import (
    INSIST,
    Fingerprint,
    difference,
    fingerprint,
    sealed,
    unsealed,
)
from lightning_prune.serialization.json_file import integers, plain_json, read_json
from lightning_prune.serialization.record_text import html_rows, one_line
from lightning_prune.utils.atomic import write_text
from lightning_prune.utils.formatting import counted
from lightning_prune.utils.modules import (
    cut,
    drop_caches_,
    freeze_empty_,
    is_within,
    named_tensors,
    set_data,
    within_any,
    without_prefix,
)
from lightning_prune.utils.named_sizes import can_replace, grows, read_size, write_size
from lightning_prune.utils.vanished import problem_with, vanish_modules_

__all__ = ["PruningRecord", "RecordError"]

VERSION = 1


class RecordError(ValueError):
    """A record is damaged, or belongs to another model. Nothing was changed.

    Example:
        >>> record = PruningRecord({"weight": {0: [2]}, "bias": {0: [2]}}, {"weight": [3, 2], "bias": [3]})
        >>> try:
        ...     record.apply_(nn.Linear(5, 3))
        ... except RecordError:
        ...     print("another model")
        another model
    """


@dataclass(repr=False)
class PruningRecord:
    """Surviving indices of parameters and buffers, and the attributes that a cut has set.

    Attributes:
        kept: parameter or buffer -> dimension -> surviving original indices, ascending. Dimensions that lost
            nothing are absent.
        shapes: parameter or buffer in ``kept`` -> its shape in the dense model.
        attributes: ``module.attribute`` -> the integer (or list of integers) that it was set to; of an attribute
            that holds named integers, ``module.attribute[name]``.
        vanished: name of a module, or of a parameter that stays untrained -> what takes its place, see
            :func:`~lightning_prune.utils.stand_ins.replacement`.
        info: further facts for the reader, such as the costs before and after. Nothing depends on them.
        dense: dtype and shape of every parameter and persistent buffer of the dense model; empty if unknown.

    Example:
        >>> record = PruningRecord({"weight": {0: [0, 2]}, "bias": {0: [0, 2]}},
        ...                        {"weight": [3, 4], "bias": [3]}, {"out_features": 2})
        >>> small = record.apply_(nn.Linear(4, 3))
        >>> small
        Linear(in_features=4, out_features=2, bias=True)
        >>> PruningRecord.from_dict(record.to_dict()) == record
        True
    """

    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: dict[str, int | list[int]] = field(default_factory=dict)
    vanished: dict[str, dict[str, Any]] = field(default_factory=dict, kw_only=True)
    info: dict[str, Any] = field(default_factory=dict)
    dense: Fingerprint = field(default_factory=dict, repr=False, compare=False)

    def __bool__(self) -> bool:
        return bool(self.kept or self.vanished)

    @property
    def cuts(self) -> tuple[Any, ...]:
        """What was removed: the indices that survive, and the modules that vanished."""
        return self.kept, self.vanished

    def __repr__(self) -> str:
        gone = f"{counted(len(self.vanished), 'module')} vanished; " if self.vanished else ""
        return f"PruningRecord({gone}{one_line(self.kept, self.shapes)})"

    def _repr_html_(self) -> str:
        return html_rows(self.kept, self.shapes)

    def apply_(self, model: nn.Module, verify: bool = True) -> nn.Module:
        """Cut a dense ``model`` in place to what survives, and return it.

        Args:
            model: built as before the first cut.
            verify: whether its names, shapes and dtypes must be those of the dense model that was cut.

        Raises:
            RecordError: the record does not fit the model, which is then unchanged.
        """
        self.check(model, verify)
        vanish_modules_(model, self.vanished)
        tensors, before = named_tensors(model), CutState.of(model, self.kept, self.attributes)
        for name, dims in self.kept.items():
            set_data(tensors[name], cut(tensors[name], dims))
        for path, value in self.attributes.items():
            owner, attribute = _owner_of(model, path)
            write_size(owner, attribute, value)
        freeze_empty_(tensors.values())
        note_cut(model, self.kept, self.shapes, self.attributes, before)
        drop_caches_(model)
        return model

    def check(self, model: nn.Module, verify: bool = False) -> None:
        """Raise RecordError unless this record fits the dense ``model``, which is not changed; see :meth:`apply_`."""
        tensors, optional = named_tensors(model), _optional_prefixes(model)
        if problem := problem_with(model, self.vanished):
            raise RecordError(problem)
        for name, dims in self.kept.items():
            if name not in tensors:
                raise RecordError(f"the record cuts {name!r}, which {type(model).__name__} does not have")
            shape = list(tensors[name].shape)
            if shape != self.shapes.get(name):
                raise RecordError(
                    f"{name!r} has shape {shape}, but the record was made for {self.shapes.get(name)}"
                )
            for dim, indices in dims.items():
                _check_indices(name, dim, indices, shape, least=0 if name.startswith(optional) else 1)
        for path, value in self.attributes.items():
            owner, attribute = _owner_of(model, path)
            current = read_size(owner, attribute)
            if not can_replace(current, value, least=0 if path.startswith(optional) else 1):
                raise RecordError(
                    f"the record sets {path!r} to {value}, but its value in {type(model).__name__} is {current!r}"
                )
            if verify and not self.dense and grows(current, value):
                raise RecordError(
                    f"the record sets {path!r} to {value}, more than its value in {type(model).__name__}, "
                    f"{current!r}, which no cut does; {INSIST}"
                )
        if verify and self.dense and (differences := difference(self.dense, fingerprint(model))):
            raise RecordError(
                f"{type(model).__name__} is not the dense model that was cut: {differences}; build it as for "
                f"training, or {INSIST}"
            )

    def then(self, later: PruningRecord) -> PruningRecord:
        """Compose this cut and a ``later`` cut of the smaller model into one record of the dense model.

        Example:
            >>> first = PruningRecord({"w": {0: [0, 2, 3]}}, {"w": [4]})
            >>> first.then(PruningRecord({"w": {0: [0, 2]}}, {"w": [3]})).kept
            {'w': {0: [0, 3]}}
        """
        names = [*self.kept, *(name for name in later.kept if name not in self.kept)]
        gone = [name for name in later.vanished if later.vanished[name].get("as") != "untrained"]
        names = [name for name in names if not within_any(name, gone)]
        kept = {name: cut_again(self.kept.get(name, {}), later.kept.get(name, {})) for name in names}
        attributes, info = {**self.attributes, **later.attributes}, {**self.info, **later.info}
        attributes = {path: value for path, value in attributes.items() if not within_any(path, gone)}
        earlier = {name: what for name, what in self.vanished.items() if not within_any(name, gone)}
        dense = self.dense or {
            name: [dtype, self.shapes.get(name, s)] for name, (dtype, s) in later.dense.items()
        }
        shapes = {name: shape for name, shape in {**later.shapes, **self.shapes}.items() if name in kept}
        vanished = {**earlier, **later.vanished}
        return PruningRecord(kept, shapes, attributes, info, dense, vanished=vanished)

    def takes_away(self, name: str) -> bool:
        """Return whether a tensor of the dense network goes with a module that vanishes."""
        for module, what in self.vanished.items():
            if what.get("as") != "untrained" and is_within(name, module):
                stays = what.get("activation")
                return not (stays and is_within(name, f"{module}.{stays}"))
        return False

    def cut_tensors(self, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Return tensors that belong to parameters of the network, such as anchors of EWC, after this cut.

        Args:
            tensors: name of a parameter or buffer -> a tensor of its shape before the cut.
            prefix: what the names in the record begin with and those of ``tensors`` do not, such as ``"net."``.

        Raises:
            RecordError: a tensor does not have the shape of its parameter.

        Example:
            >>> import torch
            >>> record = PruningRecord({"weight": {0: [0, 2]}}, {"weight": [3]})
            >>> record.cut_tensors({"weight": torch.tensor([1, 2, 3]), "other": torch.tensor([4])})
            {'weight': tensor([1, 3]), 'other': tensor([4])}
        """
        result = dict(tensors)
        for name, tensor in tensors.items():
            if dims := self.kept.get(prefix + name):
                shape = list(tensor.shape)
                if shape != self.shapes[prefix + name]:
                    raise RecordError(
                        f"the tensor {name!r} has shape {shape}, but its parameter {self.shapes[prefix + name]}"
                    )
                result[name] = cut(tensor, dims)
        return result

    def without_tensors_of(self, copy: nn.Module, original: nn.Module) -> PruningRecord:
        """Return this record of ``copy`` without the tensors that it shares with ``original``.

        Nor does it have a fingerprint, since a copy may be of another dtype.
        """
        own = {id(tensor) for tensor in named_tensors(original).values()}
        tensors = named_tensors(copy)
        kept = {name: dims for name, dims in self.kept.items() if id(tensors.get(name)) not in own}
        modules = {id(module) for module in original.modules()}
        vanished = {
            name: what for name, what in self.vanished.items() if not _is_shared(copy, name, modules, own)
        }
        return replace(self, kept=kept, dense={}, vanished=vanished)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain dictionaries, lists, strings and numbers, with their checksum."""
        content = {key: value for key, value in vars(self).items() if key != "vanished" or value}
        return sealed({"version": VERSION, **content, "info": plain_json(self.info)})

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], verify: bool = True) -> PruningRecord:
        """Make a record from the result of :meth:`to_dict`.

        Args:
            plain: plain values; those of a record from before there were checksums have none.
            verify: whether the checksum must be right.

        Raises:
            RecordError: an entry is missing, has the wrong type or was changed.
        """
        if not isinstance(plain, Mapping) or plain.get("version") != VERSION:
            raise RecordError(f"not a pruning record of version {VERSION}")
        try:
            plain = unsealed(plain, "the pruning record", verify)
            kept = {
                str(n): {_dimension(d): integers(i) for d, i in dims.items()}
                for n, dims in plain["kept"].items()
            }
            shapes = {str(name): integers(shape) for name, shape in plain["shapes"].items()}
            attributes = {
                str(p): integers([v])[0] if type(v) is int else integers(v)
                for p, v in plain["attributes"].items()
            }
            dense = {
                str(name): [str(dtype), None if s is None else integers(s)]
                for name, (dtype, s) in plain.get("dense", {}).items()
            }
            vanished = {str(name): dict(what) for name, what in plain.get("vanished", {}).items()}
            return cls(kept, shapes, attributes, dict(plain.get("info", {})), dense, vanished=vanished)
        except (KeyError, AttributeError, TypeError, ValueError, RecursionError) as error:
            raise RecordError(f"damaged pruning record: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write JSON. If writing is interrupted, ``path`` keeps its content."""
        write_text(path, json.dumps(self.to_dict(), allow_nan=False))

    @classmethod
    def load(cls, path: str | Path, verify: bool = True) -> PruningRecord:
        """Read a file that :meth:`save` wrote.

        Args:
            path: the file.
            verify: whether its checksum must be right; files from before there were checksums have none.

        Raises:
            RecordError: the file is not a pruning record, or was changed after it was written.
        """
        try:
            return cls.from_dict(read_json(path), verify)
        except ValueError as error:  # also numbers that are too long for an int
            raise RecordError(f"{path} is not a pruning record, or damaged: {error}") from error


def rerooted(record: PruningRecord, old_root: str, new_root: str) -> PruningRecord:
    """Return ``record``, whose names are relative to module ``old_root``, with names relative to ``new_root``.

    Entries outside of ``new_root`` are left out.

    Example:
        >>> record = PruningRecord({"conv.weight": {0: [1]}}, {"conv.weight": [2, 3]}, {"conv.out_channels": 1})
        >>> inner = rerooted(record, "net", "net.conv")
        >>> inner.kept, inner.shapes, inner.attributes
        ({'weight': {0: [1]}}, {'weight': [2, 3]}, {'out_channels': 1})
    """
    old, new = f"{old_root}." if old_root else "", f"{new_root}." if new_root else ""

    def renamed(entries: dict[str, Any]) -> dict[str, Any]:
        return without_prefix({old + name: value for name, value in entries.items()}, new)

    return PruningRecord(
        renamed(record.kept),
        renamed(record.shapes),
        renamed(record.attributes),
        record.info,
        renamed(record.dense),
        vanished=renamed(record.vanished),
    )


def _is_shared(copy: nn.Module, name: str, modules: set[int], tensors: set[int]) -> bool:
    """Return whether a module or parameter of a copy is the original's, too."""
    owner, _, last = name.rpartition(".")
    parent = copy.get_submodule(owner)
    if last in parent._parameters:
        return id(parent._parameters[last]) in tensors
    return id(parent._modules.get(last)) in modules


def _owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Split ``path`` into the module that it names and the attribute of that module."""
    module, _, attribute = path.rpartition(".")
    try:
        return model.get_submodule(module), attribute
    except AttributeError as error:
        raise RecordError(f"the record sets {path!r}: {error}") from error


def _optional_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of parameters that may be removed completely."""
    return tuple(f"{part}." for parts in optional_parts(model) for part in parts)


def _dimension(key: Any) -> int:
    if type(key) is not int and not (isinstance(key, str) and key.isdecimal() and str(int(key)) == key):
        raise ValueError(f"expected the number of a dimension, got {key!r}")
    return int(key)


def _check_indices(name: str, dim: int, indices: list[int], shape: list[int], least: int) -> None:
    if not 0 <= dim < len(shape):
        raise RecordError(f"{name!r} has no dimension {dim}")
    ascending = all(a < b for a, b in pairwise(indices))
    if len(indices) < least or not ascending or min(indices, default=0) < 0 or indices[-1:] >= [shape[dim]]:
        raise RecordError(
            f"the indices of {name!r}, dimension {dim}, are not ascending within 0..{shape[dim] - 1}"
        )
