"""Set-up of distillation: make the teacher, pair the taps of student and teacher, check that they fit."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
from torch import nn

from lightning_prune.distillation.config import Distillation
from lightning_prune.distillation.distiller import (
    CHANNEL_LOSSES,
    LOGIT_LOSSES,
    Distiller,
    Projections,
    TapPair,
)
from lightning_prune.distillation.logits import check_meaning
from lightning_prune.distillation.taps import Tap, TapCandidates, trace_taps
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

__all__ = ["build_distiller", "build_teacher", "check_module", "pair_taps"]


def build_teacher(distillation: Distillation, pl_module: L.LightningModule) -> Teacher:
    """Make the teacher from a network, from a file, or as a copy of the student that a later copy replaces.

    If the teacher is itself a module with ``distillation``, that is switched off.
    """
    target = target_of(pl_module, distillation.submodule)
    if distillation.copies_student:
        teacher = Teacher(target, distillation.precision)
    else:
        source, precision = distillation.teacher, distillation.precision
        teacher = load_teacher(source, target, distillation.submodule, precision)
    if isinstance(getattr(teacher.net, "distillation", None), Distillation):
        teacher.net.distillation = None  # type: ignore[assignment]
    return teacher


def pair_taps(
    student: TapCandidates,
    teacher: TapCandidates,
    taps: Sequence[str] | str,
    teacher_taps: Sequence[str] | None,
) -> list[TapPair]:
    """Pair the taps of student and teacher, position by position.

    Args:
        student: traced outputs of the student's modules.
        teacher: traced outputs of the teacher's modules.
        taps: names of the student's modules, or ``"auto"`` for its stages.
        teacher_taps: names of the teacher's modules; None: the same names, or its stages if ``taps`` is ``"auto"``.

    Raises:
        ValueError: a name is unknown, the numbers of taps differ, or two outputs cannot be pooled to each other.
    """
    ours = _tap_names(student, taps)
    theirs = _tap_names(teacher, taps) if teacher_taps is None else list(teacher_taps)
    if len(ours) != len(theirs):
        raise ValueError(
            f"student and teacher need as many taps: taps={ours}, teacher_taps={theirs}; name both"
        )
    pairs = [TapPair(student.tap(one), teacher.tap(other)) for one, other in zip(ours, theirs, strict=True)]
    for pair in pairs:
        _check_sizes(pair.student, pair.teacher)
    return pairs


def _tap_names(candidates: TapCandidates, taps: Sequence[str] | str) -> list[str]:
    if taps == "auto":
        return candidates.stages()
    return [taps] if isinstance(taps, str) else list(taps)


def _check_sizes(one: Tap, other: Tap) -> None:
    """Raise ValueError unless the outputs of two taps have the same number of spatial dimensions, 1 to 3."""
    if len(one.positions) != len(other.positions) or not 1 <= len(one.positions) <= 3:
        raise ValueError(
            f"the outputs of {one.name!r} {one.shape} and {other.name!r} {other.shape} cannot be pooled to each "
            "other: tap modules that both return maps, or both tokens"
        )


def _check_flows(pairs: Sequence[TapPair], flows: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError unless the two taps of every flow can be pooled to each other, in both networks."""
    for one, other in flows:
        _check_sizes(pairs[one].student, pairs[other].student)
        _check_sizes(pairs[one].teacher, pairs[other].teacher)


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
        taps, teacher_taps = distillation.taps, distillation.teacher_taps
        pairs = pair_taps(student_candidates, teacher_candidates, taps, teacher_taps)
    neighbours = [(n, n + 1) for n in range(len(pairs) - 1)]
    flows = neighbours if distillation.flows is None else list(distillation.flows)
    if "fsp" in distillation.wanted:
        _check_flows(pairs, flows)
    if set(CHANNEL_LOSSES) & set(distillation.wanted) and pairs and not same and projections is None:
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
    """Raise TeacherError if the compared logits differ in shape, ValueError if a loss has no meaning for them."""
    names = [name for name in LOGIT_LOSSES if name in distillation.wanted]
    if not names:
        return
    logits = distillation.logits(student.output)
    ours, theirs = tuple(logits.shape[1:]), tuple(distillation.logits(teacher.output).shape[1:])
    for name in names:
        check_meaning(name, logits, distillation.kind)
    if ours != theirs:
        raise TeacherError(
            f"the student's logits are (n, {', '.join(map(str, ours))}), the teacher's "
            f"(n, {', '.join(map(str, theirs))}): a teacher needs the same classes and sizes"
        )


def _add_projections(pl_module: L.LightningModule, pairs: Sequence[TapPair]) -> Projections:
    """Add projections for the pairs to the module, before its optimizer is made."""
    if pl_module.example_input_array is None:
        raise TeacherError(
            "fsp and cwd_features with a teacher of another architecture train a projection, which must exist "
            "before the optimizer does: set example_input_array"
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
