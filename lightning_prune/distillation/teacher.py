"""The frozen network that a student learns from (level 3)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.distillation.taps import listening
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.hashing import checksum

__all__ = ["Precision", "Teacher", "TeacherError", "checksum", "load_weights_"]

Precision = Literal["32", "bf16", "16"]
AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}


class TeacherError(ValueError):
    """The teacher cannot teach this student, or is no longer what it was."""


class Teacher:
    """A private copy of a network: always in eval mode, without gradients, in its own precision.

    It is no ``nn.Module``, so that whoever holds it does not own its parameters: they are in no optimizer, no
    checkpoint, no DDP bucket and no moving average, and ``.train()`` does not reach it.

    Args:
        net: copied; the original stays as it is.
        precision: ``"32"``: as the weights are stored. ``"bf16"`` and ``"16"``: under autocast.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 1))
        >>> teacher = Teacher(net)
        >>> output, heard = teacher.run(((torch.ones(1, 2),), {}), ["0"])
        >>> output.shape, heard["0"].shape, output.is_inference()
        (torch.Size([1, 1]), torch.Size([1, 2]), True)
        >>> teacher.verify()
    """

    def __init__(self, net: nn.Module, precision: Precision = "32") -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.precision = precision
        self.checksum = checksum(self.net)

    def run(self, example: Example, taps: Sequence[str] = ()) -> tuple[Any, dict[str, Tensor]]:
        """Its output and the tapped features: inference tensors, which autograd must not save.

        Args:
            example: positional and keyword inputs, as the student got them.
            taps: names of modules.
        """
        tensors = [tensor for tensor in self.net.parameters() if tensor.is_floating_point()]
        dtype = tensors[0].dtype if tensors else torch.get_default_dtype()
        device = tensors[0].device.type if tensors else "cpu"
        wanted = AUTOCAST.get(self.precision, dtype)
        with (
            torch.inference_mode(),
            torch.autocast(device, dtype=AUTOCAST.get(self.precision), enabled=wanted != dtype),
            listening(self.net, taps) as heard,
        ):
            args, kwargs = tree_map_only(
                Tensor, lambda x: x.detach().to(dtype) if x.is_floating_point() else x.detach(), example
            )
            return self.net(*args, **kwargs), heard

    def to(self, device: torch.device) -> Teacher:
        """Move to the device of the student."""
        self.net.to(device)
        return self

    def verify(self) -> None:
        """Prove that nothing has touched it.

        Raises:
            TeacherError: its weights or buffers have changed.
        """
        if checksum(self.net) != self.checksum:
            raise TeacherError("the teacher's weights have changed while it was teaching")

    def save(self, path: Path) -> None:
        """Write its weights; an interrupted write leaves nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        torch.save({"state_dict": self.net.state_dict()}, part)
        part.replace(path)


def make_teacher(
    source: str | Path | nn.Module, student: nn.Module, submodule: str | None, precision: Precision = "32"
) -> Teacher:
    """A trained network, or the student's own architecture with the weights of a file.

    Args:
        source: a network, or a file as :func:`load_weights_` takes it.
        student: still dense.
        submodule: its name in a Lightning checkpoint; None: it is the whole.
        precision: of the teacher.
    """
    if isinstance(source, nn.Module):
        return Teacher(source, precision)
    net = copy.deepcopy(student)
    return Teacher(load_weights_(net, source, f"{submodule}." if submodule else ""), precision)


def same_network(student: nn.Module, teacher: nn.Module, record: PruningRecord | None) -> bool:
    """Whether the student is the teacher's architecture, or was cut out of it as ``record`` says.

    Example:
        >>> same_network(nn.Linear(2, 3), nn.Linear(2, 3), None), same_network(nn.Linear(2, 3), nn.Linear(2, 4), None)
        (True, False)
    """
    ours, theirs = ({name: list(p.shape) for name, p in net.named_parameters()} for net in (student, teacher))
    cut = record.shapes if record is not None else {}
    return ours.keys() == theirs.keys() and all(theirs[name] == cut.get(name, ours[name]) for name in ours)


def check_apart(teacher: nn.Module, parameters: Collection[int]) -> None:
    """Raise TeacherError if any of the teacher's parameters is among those with the given ``id``."""
    if any(id(parameter) in parameters for parameter in teacher.parameters()):
        raise TeacherError(
            "the teacher's parameters are in the optimizer or among the module's: keep the teacher out of the "
            "module's attributes, Distillation(teacher=...) is enough"
        )


def found_again(written: str, checkpoint: str) -> Path:
    """The file of a teacher: beside the checkpoint that is resumed, else where it was written.

    Raises:
        TeacherError: it is in neither place.
    """
    name = Path(written).name
    for path in (Path(checkpoint).parent / name, Path(written)):
        if name and path.is_file():
            return path
    raise TeacherError(f"the teacher of this checkpoint is gone: put {name or 'it'} beside {checkpoint}")


def load_weights_(net: nn.Module, path: str | Path, prefix: str = "") -> nn.Module:
    """Load a dense network's weights.

    Args:
        net: of the same architecture, changed in place.
        path: a Lightning checkpoint, a run's ``net.pt``, or a file with a ``state_dict``.
        prefix: before the names in a Lightning checkpoint, ``"net."`` say; used where it occurs.

    Raises:
        FileNotFoundError: there is no such file.
        TeacherError: the file holds a pruned network, or another one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no teacher at {path}: give the checkpoint of a trained dense network")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if (saved.get("record") or {}).get("kept") or "lightning_prune" in saved:
        raise TeacherError(f"{path} holds a pruned network: the teacher is the dense one")
    state: Mapping[str, Tensor] = saved.get("state_dict", saved)
    inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    try:
        net.load_state_dict(inside if prefix and inside else state)
    except RuntimeError as error:
        raise TeacherError(f"{path} does not fit {type(net).__name__}: {error}") from error
    return net
