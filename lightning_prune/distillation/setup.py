"""Student and teacher brought together: the teacher made, taps paired, misfits refused (level 4)."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from torch import nn

from lightning_prune.distillation.config import COPY, Distillation
from lightning_prune.distillation.distiller import Distiller, Projections, TapPair, check_flows, pairs
from lightning_prune.distillation.taps import TapCandidates, survey
from lightning_prune.distillation.teacher import (
    Teacher,
    TeacherError,
    check_apart,
    make_teacher,
    same_network,
)
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.trainer.training_state import target_of
from lightning_prune.utils.example_inputs import Example

__all__ = ["check_module", "made", "prepared"]


def made(told: Distillation, pl_module: L.LightningModule) -> Teacher:
    """The teacher, from a network, a file, or, for the time being, the student. It is taught by nobody itself."""
    target = target_of(pl_module, told.submodule)
    if told.teacher == COPY:
        teacher = Teacher(target, told.precision)
    else:
        teacher = make_teacher(told.teacher, target, told.submodule, told.precision)
    if isinstance(getattr(teacher.net, "distillation", None), Distillation):
        teacher.net.distillation = None  # type: ignore[assignment]
    return teacher


def prepared(
    told: Distillation,
    pl_module: L.LightningModule,
    teacher: Teacher,
    record: PruningRecord | None,
    example: Example,
    projections: Projections | None,
) -> Distiller:
    """Lessons for the student in ``pl_module``.

    Args:
        told: what is wanted.
        pl_module: gets projections as a child, where the teacher has another architecture and FSP is wanted.
        teacher: already made.
        record: what was removed of the student.
        example: input of both.
        projections: those made before, if any.

    Raises:
        TeacherError: classes differ, or projections are needed after the optimizer was made.
        ValueError: taps or flows do not fit.
    """
    target = target_of(pl_module, told.submodule)
    like = same_network(target, teacher.net, record)
    theirs = survey(teacher.net, example)
    ours = theirs if like else survey(target, example)
    _check_classes(told, ours, theirs)
    found = pairs(ours, theirs, told.taps, told.teacher_taps) if told.needs_taps else []
    flows = list(told.flows) if told.flows is not None else [(n, n + 1) for n in range(len(found) - 1)]
    if "fsp" in told.wanted:
        check_flows(found, flows)
        if found and not like and projections is None:
            projections = _project(pl_module, found)
    losses = told.temperature, told.kind, told.ignore_index, told.logits
    return Distiller(target, teacher, found, flows, projections, *losses)


def _check_classes(told: Distillation, student: TapCandidates, teacher: TapCandidates) -> None:
    ours, theirs = (tuple(told.logits(s.output).shape[1:]) for s in (student, teacher))
    if "hinton" in told.wanted and ours != theirs:
        raise TeacherError(
            f"the student's logits are (n, {', '.join(map(str, ours))}), the teacher's "
            f"(n, {', '.join(map(str, theirs))}): a teacher needs the same classes and sizes"
        )


def _project(pl_module: L.LightningModule, found: Sequence[TapPair]) -> Projections:
    """Learned projections, made before the optimizer is."""
    if pl_module.example_input_array is None:
        raise TeacherError(
            "FSP with a teacher of another architecture trains a projection, which must exist before the "
            "optimizer does: set example_input_array"
        )
    taps = [(pair.student, pair.teacher) for pair in found]
    projections = Projections([(one.shape[one.dim], other.shape[other.dim]) for one, other in taps])
    pl_module.add_module("distillation_projections", projections)
    return projections


def check_module(
    told: Distillation, trainer: L.Trainer, pl_module: L.LightningModule, projections: Projections | None
) -> None:
    """No teacher may be among what is trained or belongs to the module; the projections must be trained.

    Raises:
        TeacherError: it is so, or they are not.
        NotImplementedError: the module optimizes by hand.
    """
    if not pl_module.automatic_optimization:
        raise NotImplementedError("distillation needs automatic optimization")
    trained = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    if isinstance(told.teacher, nn.Module):
        check_apart(told.teacher, trained | {id(parameter) for parameter in pl_module.parameters()})
    if projections and not {id(p) for p in projections.parameters()} <= trained:
        raise TeacherError("the projections to the teacher are not trained: optimize self.parameters()")
