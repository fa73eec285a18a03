"""The teacher: a frozen copy of a trained network, how it runs, and how it is saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.distillation.taps import record_outputs
from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.serialization.saved_network import SavedNetwork, write_torch
from lightning_prune.serialization.saving import load_network_
from lightning_prune.serialization.torch_file import load_torch_file
from lightning_prune.utils.distributed import broadcast, world_size
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.hashing import network_digest
from lightning_prune.utils.modules import without_prefix

__all__ = [
    "Precision",
    "Teacher",
    "TeacherError",
    "check_disjoint",
    "find_teacher_file",
    "load_teacher",
    "load_weights_",
    "same_network",
]

Precision = Literal["32", "bf16", "16"]
AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}


class TeacherError(ValueError):
    """The teacher does not fit the student, or its weights have changed."""


class Teacher:
    """A private copy of a network: always in eval mode, without gradients, in its own precision.

    It is no ``nn.Module``, so that a module that refers to it does not register its parameters: they are in no
    optimizer, checkpoint, DDP bucket or moving average, and ``.train()`` does not change its mode.

    Args:
        net: network to copy; it is not changed.
        precision: ``"32"``: precision of the stored weights. ``"bf16"`` and ``"16"``: autocast.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 1))
        >>> teacher = Teacher(net)
        >>> output, features = teacher.run(((torch.ones(1, 2),), {}), ["0"])
        >>> output.shape, features["0"].shape, output.is_inference()
        (torch.Size([1, 1]), torch.Size([1, 2]), True)
        >>> teacher.verify()
    """

    def __init__(self, net: nn.Module, precision: Precision = "32") -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.precision = precision
        self.checksum = network_digest(self.net)

    def run(self, example: Example, taps: Sequence[str] = ()) -> tuple[Any, dict[str, Tensor]]:
        """Return the output and the tapped features, as inference tensors, which autograd must not save.

        Args:
            example: positional and keyword inputs of the student.
            taps: names of modules.
        """
        parameters = [tensor for tensor in self.net.parameters() if tensor.is_floating_point()]
        dtype = parameters[0].dtype if parameters else torch.get_default_dtype()
        device = parameters[0].device.type if parameters else "cpu"
        autocast = AUTOCAST.get(self.precision, dtype)
        with (
            torch.inference_mode(),
            torch.autocast(device, dtype=AUTOCAST.get(self.precision), enabled=autocast != dtype),
            record_outputs(self.net, taps) as features,
        ):
            args, kwargs = tree_map_only(
                Tensor, lambda x: x.detach().to(dtype) if x.is_floating_point() else x.detach(), example
            )
            return self.net(*args, **kwargs), features

    def to(self, device: torch.device) -> Teacher:
        """Move the teacher to a device, in place."""
        self.net.to(device)
        return self

    def copy_weights_(self, net: nn.Module) -> None:
        """Take over weights and buffers of a network of the same architecture; :meth:`seal_` must follow."""
        self.net.load_state_dict(net.state_dict())

    def seal_(self) -> None:
        """Take rank 0's weights in a distributed run, and compute the checksum of the weights."""
        # Statistics of norms differ between ranks, and a resumed run reads those of rank 0.
        if world_size() > 1:
            state = {name: tensor.cpu() for name, tensor in self.net.state_dict().items()}
            self.net.load_state_dict(broadcast(state))
        self.checksum = network_digest(self.net)

    def verify(self) -> None:
        """Raise TeacherError if weights or buffers have changed since the teacher was made."""
        if network_digest(self.net) != self.checksum:
            raise TeacherError("the teacher's weights have changed during the training")

    def save(self, path: Path) -> None:
        """Write the weights to a file; an interrupted write leaves no file."""
        write_torch(SavedNetwork(dict(self.net.state_dict()), None), path)


def load_teacher(
    source: str | Path | nn.Module, student: nn.Module, submodule: str | None, precision: Precision = "32"
) -> Teacher:
    """Make a teacher from a trained network, or from the student's architecture and the weights in a file.

    Args:
        source: a network, or a file for :func:`load_weights_`.
        student: the dense student.
        submodule: name of the network in a Lightning checkpoint; None: it is the whole module.
        precision: precision of the teacher.
    """
    if isinstance(source, nn.Module):
        return Teacher(source, precision)
    net = copy.deepcopy(student)
    return Teacher(load_weights_(net, source, f"{submodule}." if submodule else ""), precision)


def same_network(student: nn.Module, teacher: nn.Module, record: PruningRecord | None) -> bool:
    """Return whether the student has the teacher's architecture, or had it before the pruning in ``record``.

    Example:
        >>> same_network(nn.Linear(2, 3), nn.Linear(2, 3), None), same_network(nn.Linear(2, 3), nn.Linear(2, 4), None)
        (True, False)
    """
    ours, theirs = ({name: list(p.shape) for name, p in net.named_parameters()} for net in (student, teacher))
    dense = record.shapes if record is not None else {}
    return ours.keys() == theirs.keys() and all(theirs[name] == dense.get(name, ours[name]) for name in ours)


def check_disjoint(teacher: nn.Module, parameters: Collection[int]) -> None:
    """Raise TeacherError if a parameter of the teacher is among ``parameters``, given by their ``id``."""
    if any(id(parameter) in parameters for parameter in teacher.parameters()):
        raise TeacherError(
            "the teacher's parameters are in the optimizer or among the module's: keep the teacher out of the "
            "module's attributes, Distillation(teacher=...) is enough"
        )


def find_teacher_file(saved: str, checkpoint: str) -> Path:
    """Return the file of a teacher: in the folder of the resumed checkpoint, else at the path it was saved to.

    Raises:
        TeacherError: it is in neither place.
    """
    name = Path(saved).name
    for path in (Path(checkpoint).parent / name, Path(saved)):
        if name and path.is_file():
            return path
    raise TeacherError(
        f"the file of this checkpoint's teacher is missing: put {name or 'it'} beside {checkpoint}"
    )


def load_weights_(net: nn.Module, path: str | Path, prefix: str = "") -> nn.Module:
    """Load the weights of a dense network from a file.

    Args:
        net: network of the same architecture, changed in place.
        path: a Lightning checkpoint, a run's ``net.pt``, or a file with a ``state_dict``.
        prefix: prefix of the names in a Lightning checkpoint, such as ``"net."``; ignored if no name has it.

    Raises:
        FileNotFoundError: there is no such file.
        TeacherError: the file holds a pruned network, or another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no teacher at {path}: give the checkpoint of a trained dense network")
    try:
        saved = load_torch_file(path)
    except RecordError as error:
        raise TeacherError(f"no teacher can be read from {path}: {error}") from error
    state = _dense_weights(saved, path)
    inner = without_prefix(state, prefix)
    try:
        return load_network_(net, SavedNetwork(inner if prefix and inner else state, None))
    except RecordError as error:
        raise TeacherError(f"{path} does not fit {type(net).__name__}: {error}") from error


def _dense_weights(saved: Any, path: Path) -> dict[str, Tensor]:
    """Return the state_dict in a file; raise TeacherError if it is damaged, or that of a pruned network."""
    if not isinstance(saved, Mapping):
        raise TeacherError(f"{path} holds no state_dict")
    record = saved.get("record") or {}
    if "lightning_prune" in saved or (isinstance(record, Mapping) and record.get("kept")):
        raise TeacherError(f"{path} holds a pruned network: the teacher is the dense one")
    entries = saved if "state_dict" in saved else {"state_dict": saved}
    try:
        return SavedNetwork.of(entries["state_dict"], entries).weights
    except RecordError as error:
        raise TeacherError(f"no teacher can be read from {path}: {error}") from error
