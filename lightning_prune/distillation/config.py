"""Options of distillation: the teacher, the weight of each loss, and where features are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from torch import Tensor, nn

from lightning_prune.distillation.distiller import FEATURE_LOSSES, logits_of
from lightning_prune.distillation.logits import Kind
from lightning_prune.distillation.teacher import Precision
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.arguments import check_choice

__all__ = ["BEFORE_CUT", "COPY", "WEIGHTS", "Distillation", "Ramp", "Weight"]

Weight = float | Callable[[float], float]

#: ``teacher=COPY`` and ``teacher=BEFORE_CUT`` copy the student just before its first cut.
COPY, BEFORE_CUT = "copy", "before_cut"

#: Argument of :class:`Distillation` -> loss that it weights.
WEIGHTS = {
    "alpha": "hinton",
    "beta": "attention",
    "lambda_": "fsp",
    "cwd": "cwd",
    "cwd_features": "cwd_features",
    "dist": "dist",
    "standardised": "standardised",
}


class Ramp:
    """Loss weight that changes linearly from one value to another during training.

    Args:
        first: value until ``begin``.
        last: value from ``end`` on.
        begin: progress of training (0 to 1) at which the change begins.
        end: progress of training at which the change ends.

    Raises:
        ValueError: unless ``0 <= begin < end <= 1``.

    Example:
        >>> [Ramp(0.0, 4.0, end=0.5)(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 2.0, 4.0, 4.0]
    """

    def __init__(self, first: float, last: float, begin: float = 0.0, end: float = 1.0) -> None:
        if not 0 <= begin < end <= 1:
            raise ValueError(f"need 0 <= begin < end <= 1, got {begin} and {end}")
        self.first, self.last, self.begin, self.end = first, last, begin, end

    def __call__(self, progress: float) -> float:
        """Return the weight at ``progress`` (0 to 1) of the training."""
        share = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.first + share * (self.last - self.first)


class Distillation:
    """Options of distillation for one module. Set as ``module.distillation``.

    Args:
        teacher: a checkpoint of the same network, trained dense (Lightning's, or a run's ``net.pt``); or
            ``"before_cut"`` for a frozen copy of the student as it is just before its first cut, so that
            distillation starts at the cut and needs no second training; or a trained network of any architecture.
            ``"copy"`` is the same, but without a pruning callback copies the student when training starts.
        alpha: weight of :func:`~lightning_prune.distillation.logit_losses.hinton`: a number, or a function of the
            progress of training (0 to 1) such as :class:`Ramp`.
        beta: weight of the attention loss, summed over the taps; usually 1000.
        lambda_: weight of the FSP loss, summed over pairs of taps; usually 50.
        alpha_task: weight of the module's own loss.
        temperature: temperature of the losses of logits and of ``cwd_features``, above 0. None: each loss's usual
            one: ``hinton`` 1 for logits with positions (dense prediction) and 4 for classification, ``cwd`` and
            ``cwd_features`` 4, ``dist`` 1, ``standardised`` 2.
        kind: type of classification that the logits encode; ``"auto"``: ``"binary"`` if there is one channel, else
            ``"multiclass"``.
        taps: qualified names of the student's modules whose outputs are compared, in the order that ``flows``
            refers to; ``"auto"``: the last module of each resolution stage.
        teacher_taps: the teacher's modules, if its architecture differs; None: the same names, or with
            ``taps="auto"`` its own stages.
        flows: pairs of positions in ``taps`` between which FSP matrices are computed; None: neighbours.
        submodule: qualified name of the network inside the module that returns the logits and is pruned; None:
            the module itself.
        precision: precision of the teacher: ``"32"``, or autocast to ``"bf16"`` or ``"16"``.
        ignore_index: label of the pixels that the losses of logits leave out.
        labels: returns the labels of a batch, used for ``ignore_index``; None: the second entry of the batch.
        logits: returns the logits in the network's output; None: the output, or its entry ``out`` or ``logits``.
        metric: validation metric by which teacher and student are compared; None: the one that a checkpoint or
            early stopping monitors, else the first.
        mode: ``"max"`` or ``"min"``, whichever is better; None: ``"min"`` for losses and errors, else ``"max"``.
        record: pruning record of a student that was pruned in an earlier training. The record of a pruning
            callback in the same trainer is used without it.
        cwd: weight of :func:`~lightning_prune.distillation.logit_losses.cwd` of the logits.
        cwd_features: weight of the same loss of features, summed over the taps.
        dist: weight of :func:`~lightning_prune.distillation.logit_losses.dist`.
        standardised: weight of :func:`~lightning_prune.distillation.logit_losses.standardised`.

    Raises:
        ValueError: an argument is out of range, or a loss has no meaning for the kind.

    Example:
        >>> distillation = Distillation("dense.ckpt", alpha=0.5, beta=Ramp(1000, 0), submodule="net")
        >>> distillation.wanted, distillation.weights(0.5)["attention"]
        (['hinton', 'attention'], 500.0)
        >>> Distillation("before_cut", cwd=3.0, submodule="net").wanted
        ['cwd']
    """

    def __init__(
        self,
        teacher: str | Path | nn.Module,
        alpha: Weight = 0.0,
        beta: Weight = 0.0,
        lambda_: Weight = 0.0,
        alpha_task: Weight = 1.0,
        temperature: float | None = None,
        kind: Kind = "auto",
        taps: Sequence[str] | str = "auto",
        teacher_taps: Sequence[str] | None = None,
        flows: Sequence[tuple[int, int]] | None = None,
        submodule: str | None = None,
        precision: Precision = "32",
        ignore_index: int | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        metric: str | None = None,
        mode: Literal["max", "min"] | None = None,
        record: PruningRecord | None = None,
        *,
        cwd: Weight = 0.0,
        cwd_features: Weight = 0.0,
        dist: Weight = 0.0,
        standardised: Weight = 0.0,
    ) -> None:
        check_choice("kind", kind, get_args(Kind))
        check_choice("precision", precision, get_args(Precision))
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        weights = (alpha, beta, lambda_, cwd, cwd_features, dist, standardised)
        self.parts = {"task": alpha_task, **dict(zip(WEIGHTS.values(), weights, strict=True))}
        for argument, name in {"alpha_task": "task", **WEIGHTS}.items():
            _check_weight(argument, self.parts[name])
        if "standardised" in self.wanted and kind in ("binary", "multilabel"):
            raise ValueError(
                f"standardised needs classes that exclude each other, not kind={kind!r}: use alpha"
            )
        self.teacher, self.temperature, self.kind, self.precision = teacher, temperature, kind, precision
        self.taps, self.teacher_taps, self.flows, self.submodule = taps, teacher_taps, flows, submodule
        self.ignore_index, self.labels, self.logits = ignore_index, labels, logits or logits_of
        self.metric, self.mode, self.record = metric, mode, record
        self.callback: L.Callback | None = None  # set by DistillationMixin.configure_callbacks

    @property
    def wanted(self) -> list[str]:
        """Names of the distillation losses in use: those whose weight is a function or not 0."""
        return [
            name for name, weight in self.parts.items() if name != "task" and (callable(weight) or weight)
        ]

    @property
    def needs_taps(self) -> bool:
        """Whether a loss in use compares features."""
        return bool(set(FEATURE_LOSSES) & set(self.wanted))

    @property
    def copies_student(self) -> bool:
        """Whether the teacher is a copy of the student from just before its first cut."""
        return self.teacher in (COPY, BEFORE_CUT)

    def weights(self, progress: float) -> dict[str, float]:
        """Return the weight of each loss at ``progress`` (0 to 1) of the training."""
        return {
            name: float(weight(progress) if callable(weight) else weight)
            for name, weight in self.parts.items()
        }

    def labels_of(self, batch: Any) -> Tensor | None:
        """Return the labels of a batch; None without ``ignore_index``, which alone needs them.

        Raises:
            ValueError: the batch has no tensor as second entry, and ``labels`` was not passed.
        """
        if self.ignore_index is None:
            return None
        if self.labels is not None:
            return self.labels(batch)
        if isinstance(batch, Sequence) and len(batch) > 1 and isinstance(batch[1], Tensor):
            return batch[1]
        raise ValueError(
            f"no labels in a batch of type {type(batch).__name__}: pass labels=, a function that returns them"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        return self  # copies of the module, such as a moving average, share the one teacher


def _check_weight(name: str, weight: Weight) -> None:
    """Raise ValueError for a negative weight; check functions at the progress 0, 0.5 and 1."""
    values = [weight(progress) for progress in (0.0, 0.5, 1.0)] if callable(weight) else [weight]
    if any(not value >= 0 for value in values):
        raise ValueError(f"{name} must not be negative, got {min(values)}")
