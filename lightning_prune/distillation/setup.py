"""Set-up of distillation: make the teacher, pair the taps of student and teacher, check that they fit."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from torch import nn

from lightning_prune.distillation.config import COPY, Distillation
from lightning_prune.distillation.distiller import Distiller, Projections, TapPair, check_flows, pair_taps
from lightning_prune.distillation.taps import TapCandidates, trace_taps
from lightning_prune.distillation.teacher import (
    Teacher,
    TeacherError,
    check_disjoint,
    load_teacher,
    same_network,
)
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.trainer.training_state import target_of
from lightning_prune.utils.example_inputs import Example

__all__ = ["build_distiller", "build_teacher", "check_module"]


def build_teacher(distillation: Distillation, pl_module: L.LightningModule) -> Teacher:
    """Make the teacher from a network, from a file, or as a copy of the student that a later copy replaces.

    If the teacher is itself a module with ``distillation``, that is switched off.
    """
    target = target_of(pl_module, distillation.submodule)
    if distillation.teacher == COPY:
        teacher = Teacher(target, distillation.precision)
    else:
        source, precision = distillation.teacher, distillation.precision
        teacher = load_teacher(source, target, distillation.submodule, precision)
    if isinstance(getattr(teacher.net, "distillation", None), Distillation):
        teacher.net.distillation = None  # type: ignore[assignment]
    return teacher


def build_distiller(
    distillation: Distillation,
    pl_module: L.LightningModule,
    teacher: Teacher,
    record: PruningRecord | None,
    example: Example,
    projections: Projections | None,
) -> Distiller:
    """Trace student and teacher, pair their taps, and return the distiller of one training.

    Args:
        distillation: the options.
        pl_module: module of the student; gets the projections as a child, if FSP needs them.
        teacher: the frozen network.
        record: what was removed of the student so far.
        example: positional and keyword inputs of both networks.
        projections: those of an earlier call, if any.

    Raises:
        TeacherError: the logits of student and teacher differ in shape, or projections are needed and the
            optimizer exists already.
        ValueError: taps or flows do not fit.
    """
    target = target_of(pl_module, distillation.submodule)
    same = same_network(target, teacher.net, record)
    teacher_candidates = trace_taps(teacher.net, example)
    student_candidates = teacher_candidates if same else trace_taps(target, example)
    _check_logits(distillation, student_candidates, teacher_candidates)
    pairs = []
    if distillation.needs_taps:
        names = distillation.taps, distillation.teacher_taps
        pairs = pair_taps(student_candidates, teacher_candidates, *names)
    neighbours = [(n, n + 1) for n in range(len(pairs) - 1)]
    flows = neighbours if distillation.flows is None else list(distillation.flows)
    if "fsp" in distillation.wanted:
        check_flows(pairs, flows)
        if pairs and not same and projections is None:
            projections = _add_projections(pl_module, pairs)
    return Distiller(
        target,
        teacher,
        pairs,
        flows,
        projections,
        temperature=distillation.temperature,
        kind=distillation.kind,
        ignore_index=distillation.ignore_index,
        logits=distillation.logits,
    )


def _check_logits(distillation: Distillation, student: TapCandidates, teacher: TapCandidates) -> None:
    """Raise TeacherError if the logits of student and teacher differ in shape and are compared."""
    ours, theirs = (tuple(distillation.logits(traced.output).shape[1:]) for traced in (student, teacher))
    if "hinton" in distillation.wanted and ours != theirs:
        raise TeacherError(
            f"the student's logits are (n, {', '.join(map(str, ours))}), the teacher's "
            f"(n, {', '.join(map(str, theirs))}): a teacher needs the same classes and sizes"
        )


def _add_projections(pl_module: L.LightningModule, pairs: Sequence[TapPair]) -> Projections:
    """Add projections for the pairs to the module, before its optimizer is made."""
    if pl_module.example_input_array is None:
        raise TeacherError(
            "FSP with a teacher of another architecture trains a projection, which must exist before the "
            "optimizer does: set example_input_array"
        )
    projections = Projections([(pair.student.channels, pair.teacher.channels) for pair in pairs])
    pl_module.add_module("distillation_projections", projections)
    return projections


def check_module(
    distillation: Distillation,
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    projections: Projections | None,
) -> None:
    """Check that the teacher is not trained, that the projections are, and that optimization is automatic.

    Raises:
        TeacherError: parameters of the teacher are in an optimizer or in the module, or projections are in no
            optimizer.
        NotImplementedError: the module uses manual optimization.
    """
    if not pl_module.automatic_optimization:
        raise NotImplementedError("distillation needs automatic optimization")
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    if isinstance(distillation.teacher, nn.Module):
        check_disjoint(
            distillation.teacher, trained | {id(parameter) for parameter in pl_module.parameters()}
        )
    if projections and not {id(parameter) for parameter in projections.parameters()} <= trained:
        raise TeacherError("the projections to the teacher are not trained: optimize self.parameters()")
