"""Pruned networks in files: weights, and the record that says what shape they have (level 3).

Two kinds of file, none of which can run code when it is read: what ``torch.save`` writes (Lightning's checkpoints,
``net.pt`` of a run), read with ``weights_only=True``, and safetensors, with the record as JSON in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.utils.modules import named_tensors

__all__ = [
    "CHECKPOINT_KEY",
    "Saved",
    "check_weights",
    "load_pruned",
    "part_of",
    "read",
    "save_pruned",
    "shrink_",
    "write_safetensors",
]

CHECKPOINT_KEY = "lightning_prune"
SAFETENSORS = ".safetensors"


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
        weights: as of ``state_dict()``.
        record: what was removed, from ``submodule``; None if nothing was.
        submodule: qualified name of the part that the record is about; ``""`` for the whole.
    """

    weights: dict[str, Tensor]
    record: PruningRecord | None
    submodule: str = ""

    @classmethod
    def of(cls, weights: Any, pruned: Mapping[str, Any]) -> Saved:
        """From plain values.

        Raises:
            RecordError: they are not what they should be.
        """
        record, submodule = pruned.get("record"), pruned.get("submodule") or ""
        if not isinstance(weights, Mapping) or not isinstance(submodule, str):
            raise RecordError("no state_dict, or a submodule that is no name")
        found = None if record is None else PruningRecord.from_dict(record)
        return cls(dict(weights), found, submodule)


def load_pruned(model: nn.Module, path: str | Path) -> nn.Module:
    """Cut a freshly built, dense ``model`` in place to what a file holds, load its weights, and return it.

    No trainer is needed. ``model`` may be the LightningModule that was trained, or the ``submodule`` that was
    pruned: the bare network. Everything is checked before anything is changed.

    Args:
        model: built as for training.
        path: a Lightning checkpoint (with weights only, too), the ``net.pt`` of a run, or a ``.safetensors``
            file that :func:`save_pruned` wrote.

    Raises:
        RecordError: the file is damaged, or belongs to another model; ``model`` is as it was.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile
        >>> record = PruningRecord({"weight": {0: [2]}, "bias": {0: [2]}}, {"weight": [3, 2], "bias": [3]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(nn.Linear(2, 1), record, folder + "/small.safetensors")
        ...     load_pruned(nn.Linear(2, 3), folder + "/small.safetensors").weight.shape
        torch.Size([1, 2])
    """
    saved = read(Path(path))
    if saved.submodule and set(model.state_dict()).isdisjoint(saved.weights):
        before = f"{saved.submodule}."
        inside = {
            name.removeprefix(before): w for name, w in saved.weights.items() if name.startswith(before)
        }
        saved = Saved(inside, saved.record)
    target = part_of(model, saved.submodule)
    check_weights(model, target, saved.record, saved.weights)
    if saved.record:
        saved.record.apply_(target)
    model.load_state_dict(saved.weights)
    return model


def save_pruned(
    model: nn.Module, record: PruningRecord | None, path: str | Path, submodule: str | None = None
) -> None:
    """Write a pruned network to one safetensors file; an interrupted write leaves what was there before.

    Args:
        model: the pruned network; its parameters and buffers are written from whatever device they are on.
        record: what was removed since it was dense, ``callback.record`` say.
        path: ends in ``.safetensors``.
        submodule: the part of ``model`` that ``record`` is about, if it is not the whole.

    Raises:
        ValueError: ``path`` has another ending, or the state holds something that is no tensor.
    """
    write_safetensors(Saved(dict(model.state_dict()), record, submodule or ""), Path(path))


def read(path: Path) -> Saved:
    """What a file holds; see :func:`load_pruned` for its kinds, and for what is raised."""
    return _read_safetensors(path) if path.suffix == SAFETENSORS else _read_torch(path)


def write_safetensors(saved: Saved, path: Path) -> None:
    """See :func:`save_pruned`."""
    if path.suffix != SAFETENSORS:
        raise ValueError(f"{path} must end in {SAFETENSORS}")
    record = saved.record.to_dict() if saved.record else None
    metadata = {"format": "pt", CHECKPOINT_KEY: json.dumps({"record": record, "submodule": saved.submodule})}
    weights = _separate(saved.weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    save_file(weights, beside, metadata)
    beside.replace(path)


def part_of(model: nn.Module, submodule: str) -> nn.Module:
    """A submodule by its name, or RecordError."""
    try:
        return model.get_submodule(submodule)
    except AttributeError as error:
        raise RecordError(
            f"the record is about {submodule!r}; {type(model).__name__} has none: {error}"
        ) from error


def check_weights(
    model: nn.Module,
    target: nn.Module,
    record: PruningRecord | None,
    weights: Mapping[str, Any],
    strict: bool = True,
) -> None:
    """Raise RecordError unless ``weights`` fit ``model`` once its part ``target`` is cut to ``record``.

    Args:
        model: still dense, and left as it is.
        target: the part of it that the record is about.
        record: what is to be removed.
        weights: of the whole ``model``.
        strict: whether the names must be the same, too.
    """
    if record:
        record.check(target)
    here, there = set(model.state_dict()), set(weights)
    if strict and here != there:
        raise RecordError(
            f"{type(model).__name__} and file differ in {_some(here ^ there)}; build the model as before"
        )
    cut = record.kept if record else {}
    dims = {id(tensor): cut.get(name, {}) for name, tensor in named_tensors(target).items()}
    for name, tensor in _all_tensors(model):
        kept = dims.get(id(tensor), {})
        shape = [len(kept[dim]) if dim in kept else size for dim, size in enumerate(tensor.shape)]
        found = weights.get(name)
        held = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if name in there and held != shape:
            raise RecordError(
                f"the file holds {held} for {name!r}, where {shape} should be; build the model dense"
            )


def shrink_(target: nn.Module, record: PruningRecord) -> None:
    """Cut a dense ``target`` to ``record``; one that has the record's shapes already is left alone.

    Raises:
        RecordError: it has neither the dense nor the pruned shapes.
    """
    if has_shapes_of(target, record):
        return
    try:
        record.apply_(target)
    except RecordError as error:
        raise RecordError(
            f"{error}; load this checkpoint into a module that is built dense, as before"
        ) from error


def has_shapes_of(target: nn.Module, record: PruningRecord) -> bool:
    """Whether every tensor has the size that ``record`` leaves it."""
    tensors = named_tensors(target)
    return all(name in tensors and _has(tensors[name].shape, dims) for name, dims in record.kept.items())


def _has(shape: torch.Size, dims: Mapping[int, list[int]]) -> bool:
    return all(-1 < dim < len(shape) and shape[dim] == len(indices) for dim, indices in dims.items())


def _read_torch(path: Path) -> Saved:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # damaged files make torch raise many kinds
        raise RecordError(
            f"{path} does not load with weights_only=True. If it is yours, and holds objects of classes that you "
            f"trust (hyperparameters, say), name them to torch.serialization.add_safe_globals. {error}"
        ) from error
    if not isinstance(held, Mapping) or "state_dict" not in held:
        raise RecordError(f"{path} is no checkpoint: it holds no state_dict")
    pruned = held.get(CHECKPOINT_KEY, held)
    if not isinstance(pruned, Mapping):
        raise RecordError(f"{path} holds a damaged pruning record")
    return Saved.of(held["state_dict"], pruned)


def _read_safetensors(path: Path) -> Saved:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        pruned = json.loads(metadata.get(CHECKPOINT_KEY, "{}"))
    except (SafetensorError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is damaged, or no safetensors file: {error}") from error
    if not isinstance(pruned, dict):
        raise RecordError(f"{path} holds a damaged pruning record")
    return Saved.of(weights, pruned)


def _separate(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors on the CPU, of which no two share memory."""
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"safetensors holds tensors only; the state of {_some(strange)} is something else")
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }


def _all_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under all of their names."""
    parameters, buffers = (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    return list(chain(parameters, buffers))


def _some(names: Any) -> str:
    found = sorted(names)
    return ", ".join(map(repr, found[:3])) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
