"""Files of pruned networks: weights, and the pruning record that gives their shapes.

Two formats, neither of which can run code when it is read: files of ``torch.save`` (Lightning's checkpoints, the
``net.pt`` of a run), read with ``weights_only=True``, and safetensors, with the record as JSON in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune.serialization.atomic import atomic_write
from lightning_prune.serialization.record import PruningRecord, RecordError, rerooted
from lightning_prune.utils.modules import named_tensors, without_prefix

__all__ = [
    "CHECKPOINT_KEY",
    "Part",
    "SavedNetwork",
    "check_weights",
    "find_submodule",
    "load_pruned",
    "load_torch_file",
    "names_of_copies",
    "read_network",
    "save_pruned",
    "shrink_",
    "write_safetensors",
]

CHECKPOINT_KEY = "lightning_prune"
SAFETENSORS = ".safetensors"
#: a dense module and what is removed from it
Part = tuple[nn.Module, PruningRecord]


@dataclass(frozen=True)
class SavedNetwork:
    """Content of a file: a network's weights, and its pruning record.

    Attributes:
        weights: the ``state_dict()`` of the network.
        record: what was removed from ``submodule``; None if nothing was.
        submodule: qualified name of the module that the record describes; ``""`` for the whole network.
        copies: modules of the network that were cut along, such as momentum copies -> the module of which each is a
            copy, by qualified names.
    """

    weights: dict[str, Tensor]
    record: PruningRecord | None
    submodule: str = ""
    copies: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: Any, pruned: Mapping[str, Any]) -> SavedNetwork:
        """Make the content from plain values, as they stand in a file.

        Raises:
            RecordError: a value has the wrong type.
        """
        plain_record, submodule = pruned.get("record"), pruned.get("submodule") or ""
        if not isinstance(weights, Mapping):
            raise RecordError(f"the state_dict is not a mapping but a {type(weights).__name__}")
        if not isinstance(submodule, str):
            raise RecordError(f"the submodule must be a name, got {submodule!r}")
        record = None if plain_record is None else PruningRecord.from_dict(plain_record)
        return cls(dict(weights), record, submodule, names_of_copies(pruned))

    def parts(self, model: nn.Module) -> list[Part]:
        """Return all modules of the dense ``model`` that were cut, each with its record; none if nothing was.

        Raises:
            RecordError: ``model`` does not have such a module.
        """
        if self.record is None:
            return []
        target, own = find_submodule(model, self.submodule), []
        for name, original in self.copies.items():
            copy, record = find_submodule(model, name), rerooted(self.record, self.submodule, original)
            own.append((copy, record.without_tensors_of(copy, find_submodule(model, original))))
        return [(target, self.record), *own]


def load_pruned(model: nn.Module, path: str | Path) -> nn.Module:
    """Cut a newly built, dense ``model`` in place to the shapes in a file, load the weights, and return the model.

    No trainer is needed. ``model`` may be the LightningModule that was trained, or only the ``submodule`` that was
    pruned. Everything is checked before anything is changed.

    Args:
        model: built as for training.
        path: a Lightning checkpoint (also one with weights only), the ``net.pt`` of a run, or a ``.safetensors``
            file that :func:`save_pruned` wrote.

    Raises:
        RecordError: the file is damaged, or belongs to another model. ``model`` is not changed.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile
        >>> record = PruningRecord({"weight": {0: [2]}, "bias": {0: [2]}}, {"weight": [3, 2], "bias": [3]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(nn.Linear(2, 1), record, folder + "/small.safetensors")
        ...     load_pruned(nn.Linear(2, 3), folder + "/small.safetensors").weight.shape
        torch.Size([1, 2])
    """
    saved = read_network(Path(path))
    if saved.submodule and set(model.state_dict()).isdisjoint(saved.weights):
        saved = SavedNetwork(without_prefix(saved.weights, f"{saved.submodule}."), saved.record)
    find_submodule(model, saved.submodule)
    parts = saved.parts(model)
    check_weights(model, parts, saved.weights)
    for part, record in parts:
        record.apply_(part)
    model.load_state_dict(saved.weights)
    return model


def save_pruned(
    model: nn.Module,
    record: PruningRecord | None,
    path: str | Path,
    submodule: str | None = None,
    copies: Mapping[str, str] | None = None,
) -> None:
    """Write a pruned network to one safetensors file. If writing is interrupted, ``path`` keeps its content.

    Args:
        model: the pruned network, on any device.
        record: what was removed from the dense network, for example ``callback.record``.
        path: must end in ``.safetensors``.
        submodule: name of the module that ``record`` describes; None if it is the whole ``model``.
        copies: modules in ``model`` that were cut along, for example ``callback.copies``.

    Raises:
        ValueError: ``path`` has another ending, or the state_dict has an entry that is not a tensor.

    Example:
        >>> import tempfile
        >>> record = PruningRecord({"weight": {0: [2]}, "bias": {0: [2]}}, {"weight": [3, 2], "bias": [3]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(nn.Linear(2, 1), record, folder + "/small.safetensors")
        ...     load_pruned(nn.Linear(2, 3), folder + "/small.safetensors").weight.shape
        torch.Size([1, 2])
    """
    write_safetensors(
        SavedNetwork(dict(model.state_dict()), record, submodule or "", dict(copies or {})), Path(path)
    )


def read_network(path: Path) -> SavedNetwork:
    """Read weights and record from a file; formats and errors are those of :func:`load_pruned`."""
    return _read_safetensors(path) if path.suffix == SAFETENSORS else _read_torch(path)


def write_safetensors(saved: SavedNetwork, path: Path) -> None:
    """Write weights and record; errors are those of :func:`save_pruned`."""
    if path.suffix != SAFETENSORS:
        raise ValueError(f"{path} must end in {SAFETENSORS}")
    record = saved.record.to_dict() if saved.record else None
    pruned = {"record": record, "submodule": saved.submodule, "copies": dict(saved.copies)}
    metadata = {"format": "pt", CHECKPOINT_KEY: json.dumps(pruned)}
    weights = _separate_tensors(saved.weights)
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata)


def load_torch_file(path: str | Path) -> Any:
    """Read a file of ``torch.save`` onto the CPU; only tensors and plain values, since objects could run code."""
    return torch.load(path, map_location="cpu", weights_only=True)


def find_submodule(model: nn.Module, submodule: str) -> nn.Module:
    """Return the submodule of that name, or raise RecordError if there is none."""
    try:
        return model.get_submodule(submodule)
    except AttributeError as error:
        raise RecordError(
            f"the record describes the submodule {submodule!r}, which {type(model).__name__} does not have: {error}"
        ) from error


def names_of_copies(pruned: Mapping[str, Any]) -> dict[str, str]:
    """Return copy -> original of a file's pruning entry, or raise RecordError if these are not names."""
    copies = pruned.get("copies", {})
    if not isinstance(copies, Mapping) or not all(
        isinstance(name, str) for each in copies.items() for name in each
    ):
        raise RecordError(f"the copies that were cut along must be given by names, got {str(copies)[:80]}")
    return dict(copies)


def check_weights(
    model: nn.Module, parts: Sequence[Part], weights: Mapping[str, Any], strict: bool = True
) -> None:
    """Raise RecordError unless ``weights`` fit ``model`` after its ``parts`` were cut to their records.

    Args:
        model: the dense model; not changed.
        parts: the modules that are cut, each with its record.
        weights: state_dict of the whole ``model``.
        strict: whether the names must be the same, too.
    """
    for part, record in parts:
        record.check(part)
    expected_names, saved_names = set(model.state_dict()), set(weights)
    if strict and expected_names != saved_names:
        names = _first_names(expected_names ^ saved_names)
        raise RecordError(
            f"{type(model).__name__} and the file differ in {names}; build the model as for training"
        )
    shapes = _pruned_shapes(model, parts)
    for name, expected in shapes.items():
        value = weights.get(name)
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if name in saved_names and shape != expected:
            raise RecordError(
                f"the file has {shape} for {name!r}, expected {expected}; build the model dense"
            )


def _pruned_shapes(model: nn.Module, parts: Sequence[Part]) -> dict[str, list[int]]:
    """Shape of every parameter and buffer of ``model``, under all of its names, after its ``parts`` were cut."""
    # By identity: a tensor that is cut in a part may have further names in `model`.
    cuts = {
        id(tensor): record.kept[name]
        for part, record in parts
        for name, tensor in named_tensors(part).items()
        if name in record.kept
    }
    tensors = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: _pruned_shape(tensor, cuts.get(id(tensor), {})) for name, tensor in tensors}


def _pruned_shape(tensor: Tensor, dims: Mapping[int, list[int]]) -> list[int]:
    return [len(dims[dim]) if dim in dims else size for dim, size in enumerate(tensor.shape)]


def shrink_(target: nn.Module, record: PruningRecord) -> None:
    """Cut a dense ``target`` to ``record``; do nothing if it already has the pruned shapes.

    Raises:
        RecordError: ``target`` has neither the dense nor the pruned shapes.
    """
    if has_shapes_of(target, record):
        return
    try:
        record.apply_(target)
    except RecordError as error:
        raise RecordError(
            f"{error}; load this checkpoint into a module that is built dense, as for training"
        ) from error


def has_shapes_of(target: nn.Module, record: PruningRecord) -> bool:
    """Whether every tensor in ``record`` has its pruned size already."""
    tensors = named_tensors(target)
    return all(
        name in tensors and _has_sizes(tensors[name].shape, dims) for name, dims in record.kept.items()
    )


def _has_sizes(shape: torch.Size, dims: Mapping[int, list[int]]) -> bool:
    return all(-1 < dim < len(shape) and shape[dim] == len(indices) for dim, indices in dims.items())


def _read_torch(path: Path) -> SavedNetwork:
    try:
        content = load_torch_file(path)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # damaged files make torch raise many types of errors
        raise RecordError(
            f"{path} does not load with weights_only=True. If you trust the file, and it contains objects of other "
            f"classes (for example hyperparameters), pass these to torch.serialization.add_safe_globals. {error}"
        ) from error
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise RecordError(f"{path} is not a checkpoint: it has no state_dict")
    pruned = content.get(CHECKPOINT_KEY, content)
    if not isinstance(pruned, Mapping):
        raise RecordError(f"the pruning record in {path} is damaged")
    return SavedNetwork.of(content["state_dict"], pruned)


def _read_safetensors(path: Path) -> SavedNetwork:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        pruned = json.loads(metadata.get(CHECKPOINT_KEY, "{}"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is damaged, or not a safetensors file: {error}") from error
    if not isinstance(pruned, dict):
        raise RecordError(f"the pruning record in {path} is damaged")
    return SavedNetwork.of(weights, pruned)


def _separate_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy the tensors of a state_dict to the CPU, so that no two share memory: safetensors refuses those."""
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"a safetensors file can store tensors only; {_first_names(others)} in the state_dict are not tensors"
        )
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }


def _first_names(names: Iterable[str]) -> str:
    """The first three names in alphabetical order, and the number of the others."""
    names = sorted(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
