"""Weights and pruning record as they stand in a file, read and written with their checksums."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune.serialization.integrity import CHECKSUM, INSIST, difference, first_names, weight_sums
from lightning_prune.serialization.json_file import MAX_BYTES, parse_json
from lightning_prune.serialization.record import PruningRecord, RecordError, rerooted
from lightning_prune.serialization.torch_file import load_torch_file
from lightning_prune.utils.atomic import atomic_write
from lightning_prune.utils.hashing import json_digest

__all__ = [
    "CHECKPOINT_KEY",
    "INTEGRITY",
    "Part",
    "SavedNetwork",
    "find_submodule",
    "integrity_of",
    "names_of_copies",
    "read_network",
    "write_safetensors",
    "write_torch",
]

CHECKPOINT_KEY = "lightning_prune"
INTEGRITY = "integrity"
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
        verified: whether the file has checksums, and they were right.
    """

    weights: dict[str, Tensor]
    record: PruningRecord | None
    submodule: str = ""
    copies: Mapping[str, str] = field(default_factory=dict)
    verified: bool = False

    @classmethod
    def of(cls, weights: Any, pruned: Mapping[str, Any], verify: bool = True) -> SavedNetwork:
        """Make the content from plain values, as they stand in a file.

        Args:
            weights: the state_dict.
            pruned: ``record``, ``submodule``, ``copies`` and ``integrity``; all but the last are checked against it.
            verify: whether checksums, if there are any, must be right.

        Raises:
            RecordError: a value has the wrong type, or was changed.
        """
        plain_record, submodule = pruned.get("record"), pruned.get("submodule") or ""
        if not isinstance(weights, Mapping):
            raise RecordError(f"the state_dict is not a mapping but a {type(weights).__name__}")
        if not all(isinstance(name, str) for name in weights):
            raise RecordError("the state_dict has names that are not strings")
        if not isinstance(submodule, str):
            raise RecordError(f"the submodule must be a name, got {submodule!r}")
        record = None if plain_record is None else PruningRecord.from_dict(plain_record, verify)
        verified = verify and _has_right_sums(weights, pruned)
        return cls(dict(weights), record, submodule, names_of_copies(pruned), verified)

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


def read_network(path: Path, verify: bool = True) -> SavedNetwork:
    """Read weights and record from a file; formats and errors are those of ``load_pruned``."""
    return (_read_safetensors if path.suffix == SAFETENSORS else _read_torch)(path, verify)


def integrity_of(weights: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checksums of every entry of a state_dict, and one of these and of what goes with them.

    Args:
        weights: the state_dict.
        pruned: ``record``, ``submodule`` and ``copies`` as plain values, of which each may be missing.

    Example:
        >>> sorted(integrity_of({"w": torch.zeros(1)}, {"record": None}))
        ['checksum', 'sums']
    """
    sums = weight_sums(weights)
    return {"sums": sums, CHECKSUM: _checksum(sums, pruned)}


def _checksum(sums: Mapping[str, Any], pruned: Mapping[str, Any]) -> str:
    record = pruned.get("record")  # it has a checksum of its own
    record = None if record is None else record.get(CHECKSUM)
    return json_digest([sums, record, pruned.get("submodule") or "", dict(pruned.get("copies") or {})])


def _has_right_sums(weights: Mapping[str, Any], pruned: Mapping[str, Any]) -> bool:
    """Return whether there are checksums; raise RecordError if one does not match."""
    integrity = pruned.get(INTEGRITY)
    if integrity is None:
        return False
    try:
        sums, checksum = integrity["sums"], integrity[CHECKSUM]
        if checksum != _checksum(sums, pruned):
            raise RecordError("its record, the names of its copies or its checksums do not belong together")
        if differences := difference(sums, weight_sums(weights)):
            raise RecordError(f"its weights differ from those that were written: {differences}")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise RecordError(
            f"the file is damaged or was changed after it was written: {error}; {INSIST}"
        ) from error
    return True


def write_torch(saved: SavedNetwork, path: Path, **more: Any) -> None:
    """Write weights and record by ``torch.save``, with their checksums and ``more`` plain values or tensors."""
    pruned = _plain(saved)
    content = {"state_dict": saved.weights, **pruned, INTEGRITY: integrity_of(saved.weights, pruned), **more}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def _plain(saved: SavedNetwork) -> dict[str, Any]:
    record = saved.record.to_dict() if saved.record is not None else None
    return {"record": record, "submodule": saved.submodule, "copies": dict(saved.copies)}


def write_safetensors(saved: SavedNetwork, path: Path) -> None:
    """Write weights and record; errors are those of ``save_pruned``."""
    if path.suffix != SAFETENSORS:
        raise ValueError(f"{path} must end in {SAFETENSORS}")
    weights, pruned = _separate_tensors(saved.weights), _plain(saved)
    pruned[INTEGRITY] = integrity_of(weights, pruned)
    metadata = {"format": "pt", CHECKPOINT_KEY: json.dumps(pruned)}
    try:
        with atomic_write(path) as temporary:
            permissions = temporary.stat().st_mode
            save_file(weights, temporary, metadata)
            temporary.chmod(permissions)  # the library lets only the owner read its files
    except SafetensorError as error:  # a full disk, say, for which the library has no class of its own
        raise OSError(f"{path} could not be written: {error}") from error


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


def _read_torch(path: Path, verify: bool) -> SavedNetwork:
    content = load_torch_file(path, verify)
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise RecordError(f"{path} is not a checkpoint: it has no state_dict")
    pruned = content.get(CHECKPOINT_KEY, content)
    if not isinstance(pruned, Mapping):
        raise RecordError(f"the pruning record in {path} is damaged")
    with _named(path):
        return SavedNetwork.of(content["state_dict"], pruned, verify)


def _read_safetensors(path: Path, verify: bool) -> SavedNetwork:
    try:
        _check_header(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        pruned = parse_json(metadata.get(CHECKPOINT_KEY, "{}"))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the reader raises many types for a damaged file
        raise RecordError(f"{path} is damaged, or not a safetensors file: {error}") from error
    if not isinstance(pruned, dict):
        raise RecordError(f"the pruning record in {path} is damaged")
    with _named(path):
        return SavedNetwork.of(weights, pruned, verify)


def _check_header(path: Path) -> None:
    """Raise if the header is larger than a file's metadata may be; the reader would unpack it."""
    if not path.is_file() and path.exists():
        raise RecordError("it is a folder or a pipe, not a file")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_BYTES:
        raise RecordError(f"its header has {size} bytes, at most {MAX_BYTES} are read")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the path before the message of a RecordError."""
    try:
        yield
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from error


def _separate_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy the tensors of a state_dict to the CPU, so that no two share memory: safetensors refuses those."""
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"a safetensors file can store tensors only; {first_names(others)} in the state_dict are not tensors"
        )
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
