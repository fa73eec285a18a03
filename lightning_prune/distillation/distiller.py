"""One step of distillation: the student is listened to, the teacher asked, the losses taken (level 3)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.distillation.losses import Kind, attention_map, common_size, flow, hinton, mean_square
from lightning_prune.distillation.taps import Tap, TapCandidates
from lightning_prune.distillation.teacher import Teacher, TeacherError
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.example_inputs import Example

__all__ = ["Distiller", "Projections", "TapCall", "TapPair", "logits_of", "pairs"]

PARTS = ("hinton", "attention", "fsp")


@dataclass(frozen=True)
class TapPair:
    """A tap of the student and the one of the teacher that it is compared with."""

    student: Tap
    teacher: Tap


@dataclass
class TapCall:
    """One forward of the student: what went in, what came out, what was heard."""

    example: Example
    output: Any
    heard: dict[str, Tensor]


class Projections(nn.Module):
    """Learned 1x1 projections from the student's channels to those of a teacher of another architecture.

    They keep the width of the dense student: once filters are removed, the columns of what survives are used. They
    belong to the training, not to the network: ``state_dict`` leaves them out.

    Args:
        widths: channels of student and teacher at each tap.

    Example:
        >>> project = Projections([(4, 3)])
        >>> project(0, torch.zeros(2, 2, 5, 5), torch.tensor([0, 3])).shape, project.state_dict()
        (torch.Size([2, 3, 5, 5]), OrderedDict())
    """

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        for number, (ours, theirs) in enumerate(widths):
            weight = nn.Parameter(torch.empty(theirs, ours))
            nn.init.normal_(weight, std=ours**-0.5)
            self.register_parameter(f"tap{number}", weight)

    def forward(self, number: int, features: Tensor, kept: Tensor) -> Tensor:
        """``(n, student's surviving channels, ...)`` to ``(n, teacher's channels, ...)``."""
        weight = self.get_parameter(f"tap{number}").index_select(1, kept)
        return torch.einsum("nc...,dc->nd...", features, weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        return None

    def _load_from_state_dict(self, *args: Any) -> None:
        return None


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returns: a tensor, or the entry ``out`` or ``logits`` of a dictionary.

    Raises:
        TeacherError: it is something else.
    """
    if isinstance(output, Mapping):
        output = output.get("out", output.get("logits"))
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TeacherError(
            "no tensor of logits in the network's output: pass logits=, which finds them in it"
        )
    return output


def pairs(
    student: TapCandidates, teacher: TapCandidates, taps: Sequence[str] | str, others: Sequence[str] | None
) -> list[TapPair]:
    """The taps of both, position by position.

    Args:
        student: heard of the student.
        teacher: heard of the teacher.
        taps: the student's modules, or ``"auto"``.
        others: the teacher's modules; None: the same names, or its own stages if ``taps`` is ``"auto"``.

    Raises:
        ValueError: a name is unknown, or sizes cannot be pooled to each other.
    """
    ours = student.stages() if taps == "auto" else [taps] if isinstance(taps, str) else list(taps)
    theirs = list(others) if others is not None else teacher.stages() if taps == "auto" else ours
    if len(ours) != len(theirs):
        raise ValueError(
            f"student and teacher need as many taps: taps={ours}, teacher_taps={theirs}; name both"
        )
    found = [TapPair(student.tap(one), teacher.tap(other)) for one, other in zip(ours, theirs, strict=True)]
    for pair in found:
        _check_sizes(pair.student, pair.teacher)
    return found


@dataclass
class Distiller:
    """The student listens; :meth:`parts` is what it has to learn.

    Args:
        target: the student's network.
        teacher: the frozen one.
        pairs: where they are compared.
        flows: which two pairs each FSP matrix lies between.
        projections: for a teacher of another architecture; None: its channels are sliced by the record.
        temperature: of ``hinton``.
        kind: of the logits.
        ignore_index: of the labels.
        logits: finds them in the output of either network.
    """

    target: nn.Module
    teacher: Teacher
    pairs: list[TapPair]
    flows: list[tuple[int, int]]
    projections: Projections | None = None
    temperature: float = 4.0
    kind: Kind = "multiclass"
    ignore_index: int | None = None
    logits: Callable[[Any], Tensor] = logits_of
    active: bool = False
    calls: list[TapCall] = field(default_factory=list)
    heard: dict[str, Tensor] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    _record: PruningRecord | None = None

    def follow(self, record: PruningRecord | None, device: torch.device) -> None:
        """Take note of what has been removed from the student; ``record`` is of the whole network."""
        if self.kept and record is self._record and self.kept[0].device == device:
            return
        self._record = record
        known = record or PruningRecord()
        self.kept = [torch.tensor(pair.student.kept(known), device=device) for pair in self.pairs]

    def attach(self) -> None:
        """Listen to the student, in forwards inside :meth:`listening` only.

        Compiled code must not see into the hooks: it would keep what they heard, and the graph behind it, alive.
        """
        hear, heard_all = torch.compiler.disable(self._hear), torch.compiler.disable(self._heard_all)
        for pair in self.pairs:
            tapped = self.target.get_submodule(pair.student.name)
            self.handles.append(tapped.register_forward_hook(partial(hear, pair.student.name)))
        self.handles.append(self.target.register_forward_hook(heard_all, with_kwargs=True))

    def detach(self) -> None:
        """Leave no hooks and no features behind."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.calls, self.heard = [], [], {}

    @contextmanager
    def listening(self) -> Iterator[list[TapCall]]:
        """The student's forwards inside the block."""
        self.active, self.calls, self.heard = True, [], {}
        try:
            yield self.calls
        finally:
            self.active, self.calls, self.heard = False, [], {}

    def parts(
        self, calls: Sequence[TapCall], labels: Tensor | None, wanted: Collection[str]
    ) -> dict[str, Tensor]:
        """Each wanted loss, the mean over the student's forwards.

        Args:
            calls: the student's forwards of one step.
            labels: for ``ignore_index``.
            wanted: of ``"hinton"``, ``"attention"``, ``"fsp"``.
        """
        found = [self._of(call, labels, wanted) for call in calls]
        return {
            name: torch.stack([parts[name] for parts in found]).mean() for name in PARTS if name in wanted
        }

    def _hear(self, name: str, module: nn.Module, args: Any, out: Tensor) -> None:
        if self.active:
            self.heard[name] = out

    def _heard_all(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if self.active:
            self.calls.append(TapCall((args, kwargs), out, self.heard))
            self.heard = {}

    def _of(self, call: TapCall, labels: Tensor | None, wanted: Collection[str]) -> dict[str, Tensor]:
        """What is kept of the teacher is small: its logits, one map per tap, one matrix per pair of taps."""
        names = [pair.teacher.name for pair in self.pairs] if {"attention", "fsp"} & set(wanted) else []
        student = [pair.student.channels_first(call.heard[pair.student.name]) for pair in self.pairs if names]
        with torch.autocast(self.kept[0].device.type if self.kept else "cpu", enabled=False):
            output, heard = self.teacher.run(call.example, names)
            theirs = [pair.teacher.channels_first(heard[pair.teacher.name]) for pair in self.pairs if names]
            with torch.no_grad():  # no longer in inference mode: what is computed here, autograd may save
                soft = self.logits(output).clone() if "hinton" in wanted else None
                maps = self._maps(theirs, student) if "attention" in wanted else []
                told = self._flows(self._sliced(theirs)) if "fsp" in wanted else []
            found = {}
            if soft is not None:
                found["hinton"] = self._hinton(self.logits(call.output), soft, labels)
            if "attention" in wanted:
                said = self._maps(student, theirs)
                found["attention"] = sum_of(map(mean_square, said, maps))
            if "fsp" in wanted:
                found["fsp"] = sum_of(map(mean_square, self._flows(self._projected(student)), told))
        return found

    def _hinton(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        return hinton(student, teacher, self.temperature, self.kind, labels, self.ignore_index)

    def _maps(self, features: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
        return [attention_map(x, common_size(x, other)) for x, other in zip(features, others, strict=True)]

    def _flows(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [flow(features[one], features[other]) for one, other in self.flows]

    def _sliced(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The teacher's channels that the student still has."""
        if self.projections is not None:
            return list(features)
        return [
            x if x.shape[1] == len(kept) else x.index_select(1, kept)
            for x, kept in zip(features, self.kept, strict=True)
        ]

    def _projected(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The student's features in the teacher's channels."""
        for pair, x, kept in zip(self.pairs, features, self.kept, strict=True):
            if x.shape[1] != len(kept):
                raise TeacherError(
                    f"the student has {x.shape[1]} channels at {pair.student.name!r}, its record says {len(kept)}: "
                    "pass record= of a student that was pruned before"
                )
        if self.projections is None:
            return list(features)
        return [
            self.projections(n, x, kept) for n, (x, kept) in enumerate(zip(features, self.kept, strict=True))
        ]


def sum_of(terms: Any) -> Tensor:
    """Sum of scalars."""
    return torch.stack(list(terms)).sum()


def _check_sizes(one: Tap, other: Tap) -> None:
    if len(one.positions) != len(other.positions) or not 1 <= len(one.positions) <= 3:
        raise ValueError(
            f"the outputs of {one.name!r} {one.shape} and {other.name!r} {other.shape} cannot be pooled to each "
            "other: tap modules that both return maps, or both tokens"
        )


def check_flows(found: Sequence[TapPair], flows: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError unless both networks can be pooled between the two taps of every flow."""
    for one, other in flows:
        _check_sizes(found[one].student, found[other].student)
        _check_sizes(found[one].teacher, found[other].teacher)
