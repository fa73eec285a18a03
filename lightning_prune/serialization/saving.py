"""Files of pruned networks: weights, and the pruning record that gives their shapes.

Two formats, neither of which can run code when it is read: files of ``torch.save`` (Lightning's checkpoints, the
``net.pt`` of a run), read with ``weights_only=True``, and safetensors, with the record as JSON in the metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.serialization.carried_record import dense_again_
from lightning_prune.serialization.cut_notes import notes_of
from lightning_prune.serialization.integrity import INSIST, first_names
from lightning_prune.serialization.model_state import unchanged_on_error
from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.serialization.saved_network import (
    CHECKPOINT_KEY,
    Part,
    SavedNetwork,
    find_submodule,
    names_of_copies,
    read_network,
    write_safetensors,
)
from lightning_prune.serialization.torch_file import load_torch_file
from lightning_prune.utils.hashing import is_plain_tensor
from lightning_prune.utils.modules import cut_shape, named_tensors, tensors_by_all_names, without_prefix
from lightning_prune.utils.vanished import vanished_modules

#: files of weights with their record in the folder of ``save_pretrained``, and in that of a run
NETWORK_FILES = ("model.safetensors", "net.pt")

__all__ = [
    "CHECKPOINT_KEY",
    "Part",
    "SavedNetwork",
    "check_weights",
    "find_submodule",
    "load_network_",
    "load_pruned",
    "load_torch_file",
    "names_of_copies",
    "network_file",
    "read_network",
    "save_pruned",
    "shrink_",
    "write_safetensors",
]


def load_pruned(model: nn.Module, path: str | Path, verify: bool = True) -> nn.Module:
    """Cut ``model`` in place to the shapes in a file, load the weights, and return the model.

    No trainer is needed. ``model`` may be the LightningModule that was trained, or only the ``submodule`` that was
    pruned. Everything is checked before anything is changed; if loading fails nevertheless, for example in a
    ``set_extra_state`` of the model, all is put back.

    Args:
        model: built as for training, or cut before: it carries the record of its cuts, and gets its dense shapes
            back.
        path: a Lightning checkpoint (also one with weights only), the ``net.pt`` of a run, a ``.safetensors`` file
            that :func:`save_pruned` wrote, or a folder: of a run, or of :func:`save_pretrained`.
        verify: whether the checksums of the file must be right, and names, shapes and dtypes of ``model`` those of
            the dense network. Files from before there were checksums have none, and load as they are.

    Raises:
        RecordError: the file is damaged, was changed, or belongs to another model. ``model`` is as it was.
        UnsafeFileError: the file holds objects of classes that are not loaded without permission; a RecordError.
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile
        >>> record = PruningRecord({"weight": {0: [2]}, "bias": {0: [2]}}, {"weight": [3, 2], "bias": [3]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pruned(nn.Linear(2, 1), record, folder + "/small.safetensors")
        ...     load_pruned(nn.Linear(2, 3), folder + "/small.safetensors").weight.shape
        torch.Size([1, 2])
    """
    path = network_file(Path(path))
    try:
        return load_network_(model, read_network(path, verify), verify)
    except RecordError as error:
        raise type(error)(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def network_file(path: Path) -> Path:
    """Return the file of the weights in a folder of ``save_pretrained`` or of a run; other paths as they are.

    Raises:
        FileNotFoundError: the folder has neither.
    """
    if not path.is_dir() or path.suffix == ".safetensors":
        return path
    for name in NETWORK_FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"the folder {path} has neither {' nor '.join(NETWORK_FILES)}: give a file, or the folder of a run that has "
        "ended or of save_pretrained"
    )


def load_network_(model: nn.Module, saved: SavedNetwork, verify: bool = True) -> nn.Module:
    """Cut the dense ``model`` to the shapes of ``saved`` and load its weights; see :func:`load_pruned`."""
    if any(map(is_lazy, model.parameters())):
        raise RecordError(
            f"{type(model).__name__} has lazy parameters without a shape: run it on an example first"
        )
    if saved.submodule and set(model.state_dict()).isdisjoint(saved.weights):
        weights = without_prefix(saved.weights, f"{saved.submodule}.")
        saved = replace(saved, weights=weights, submodule="", copies={})
    parts = saved.parts(model)
    find_submodule(model, saved.submodule)
    with _dense_if_needed_(model, parts, saved.weights):
        _cut_and_load_(model, parts, saved, verify)
    return model


def _cut_and_load_(model: nn.Module, parts: Sequence[Part], saved: SavedNetwork, verify: bool) -> None:
    """Cut the parts of a dense model and load its weights; if that fails, all is put back."""
    check_weights(model, parts, saved.weights)
    _check_kinds(model, saved.weights, same_dtype=saved.verified)
    if saved.record is not None:
        saved.record.check(parts[0][0], verify)
    replaced = [x for part, record in parts for name, x in named_tensors(part).items() if name in record.kept]
    try:
        with unchanged_on_error(model, replaced):
            for part, record in parts:
                record.apply_(part, verify=False)
            model.load_state_dict(saved.weights)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of hooks and set_extra_state of the model, too
        raise RecordError(
            f"the file does not load into {type(model).__name__}, which is as it was: {error}"
        ) from error


@contextmanager
def _dense_if_needed_(model: nn.Module, parts: Sequence[Part], weights: Mapping[str, Any]) -> Iterator[None]:
    """Give a model that was cut before its dense shapes back, unless the weights fit its present ones.

    If the block raises, the model is cut as before.
    """
    try:
        check_weights(model, parts, weights)
    except RecordError:
        if any(notes_of(model)) or any(vanished_modules(model)):
            networks = [part for part, _ in parts] or [model]
            with dense_again_(
                [(network, networks[1:] if n == 0 else ()) for n, network in enumerate(networks)]
            ):
                yield
            return
    yield


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
    gone = _vanishing(parts)
    names_gone = {name for name, tensor in tensors_by_all_names(model) if id(tensor) in gone}
    expected_names, saved_names = set(model.state_dict()) - names_gone, set(weights)
    if strict and expected_names != saved_names:
        names = first_names(expected_names ^ saved_names)
        raise RecordError(
            f"{type(model).__name__} and the file differ in {names}; build the model as for training"
        )
    shapes = _pruned_shapes(model, parts)
    for name, expected in shapes.items():
        shape = _shape_of(weights.get(name))
        if name in saved_names and shape != expected:
            raise RecordError(
                f"the file has {shape} for {name!r}, expected {expected}; build the model dense"
            )


def _shape_of(value: Any) -> list[int] | str:
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _check_kinds(model: nn.Module, weights: Mapping[str, Any], same_dtype: bool) -> None:
    """Raise RecordError if a weight has no plain values, or would be another number in the model's dtype."""
    for name, tensor in tensors_by_all_names(model):
        value = weights.get(name)
        if not isinstance(value, Tensor):
            continue
        if tensor.is_meta:
            raise RecordError(
                f"{name!r} of the model is on the meta device: move it with to_empty(device=...) first"
            )
        if not is_plain_tensor(value) and is_plain_tensor(tensor):
            raise RecordError(
                f"{name!r} in the file is a tensor without plain values (sparse, nested, quantised or on meta)"
            )
        if not torch.can_cast(value.dtype, tensor.dtype) or (same_dtype and value.dtype != tensor.dtype):
            raise RecordError(
                f"{name!r} is {value.dtype} in the file, but {tensor.dtype} in the model: convert the model, "
                f"for example by model.to({value.dtype}), or {INSIST}"
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
    gone = _vanishing(parts)
    tensors = ((name, tensor) for name, tensor in tensors_by_all_names(model) if id(tensor) not in gone)
    return {name: cut_shape(tensor.shape, cuts.get(id(tensor), {})) for name, tensor in tensors}


def _vanishing(parts: Sequence[Part]) -> set[int]:
    """Return the ids of the tensors that go with the modules that vanish."""
    return {
        id(tensor)
        for part, record in parts
        for name, tensor in tensors_by_all_names(part)
        if record.takes_away(name)
    }


def shrink_(target: nn.Module, record: PruningRecord) -> None:
    """Cut a dense ``target`` to ``record``; do nothing if it already has the pruned shapes.

    Raises:
        RecordError: ``target`` has neither the dense nor the pruned shapes.
    """
    if has_shapes_of(target, record):
        return
    try:
        record.apply_(target, verify=False)
    except RecordError as error:
        raise RecordError(
            f"{error}; load this checkpoint into a module that is built dense, as for training"
        ) from error


def has_shapes_of(target: nn.Module, record: PruningRecord) -> bool:
    """Whether every tensor in ``record`` has its pruned size already."""
    tensors = named_tensors(target)
    modules = {name for name, what in record.vanished.items() if what.get("as") != "untrained"}
    has_blocks = modules <= {name for name, _, _ in vanished_modules(target)}
    return has_blocks and all(
        name in tensors and _has_sizes(tensors[name].shape, dims) for name, dims in record.kept.items()
    )


def _has_sizes(shape: torch.Size, dims: Mapping[int, list[int]]) -> bool:
    return all(-1 < dim < len(shape) and shape[dim] == len(indices) for dim, indices in dims.items())
