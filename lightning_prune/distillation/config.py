"""NEW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from torch import Tensor, nn

from lightning_prune.distillation.distiller import logits_of
from lightning_prune.distillation.losses import Kind
from lightning_prune.distillation.teacher import Precision
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.arguments import check_choice

Weight = float | Callable[[float], float]


COPY = "copy"


class Ramp:
    """A weight that goes from one value to another while training goes on, in a straight line.

    Args:
        first: until ``begin``.
        last: from ``end`` on.
        begin: share of the training that is over when it starts to change.
        end: share that is over when it stops.

    Example:
        >>> [Ramp(0.0, 4.0, end=0.5)(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 2.0, 4.0, 4.0]
    """

    def __init__(self, first: float, last: float, begin: float = 0.0, end: float = 1.0) -> None:
        if not 0 <= begin < end <= 1:
            raise ValueError(f"need 0 <= begin < end <= 1, got {begin} and {end}")
        self.first, self.last, self.begin, self.end = first, last, begin, end

    def __call__(self, progress: float) -> float:
        """The weight when ``progress`` of the training is over."""
        share = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.first + share * (self.last - self.first)


class Distillation:
    """From whom a module learns, and how much each part counts. Set as ``module.distillation``.

    Args:
        teacher: the checkpoint of the same network, trained dense (Lightning's, or a run's ``net.pt``); or
            ``"copy"``: the student as it is before its first cut; or a trained network, of any architecture.
        alpha: weight of :func:`~lightning_prune.distillation.losses.hinton`: a number, or a function of the share
            of the training that is over, such as :class:`Ramp`.
        beta: weight of the attention maps, summed over the taps; customary: 1000.
        lambda_: weight of the FSP matrices, summed over pairs of taps; customary: 50.
        alpha_task: weight of the module's own loss.
        temperature: of ``hinton``.
        kind: of the logits.
        taps: qualified names of the student's modules, in the order of the flows; ``"auto"``: the ends of its
            resolution stages.
        teacher_taps: those of a teacher of another architecture; None: the same names, or its own stages.
        flows: pairs of positions in ``taps`` between which the FSP matrices lie; None: neighbours.
        submodule: the network inside the module, if it is not the module itself: the part that gives the
            logits and is pruned.
        precision: of the teacher: ``"32"``, or autocast to ``"bf16"`` or ``"16"``.
        ignore_index: pixels with this label do not count in ``hinton``.
        labels: finds them in a batch; by default its second entry. Only needed for ``ignore_index``.
        logits: finds them in the network's output; by default the output, or its entry ``out`` or ``logits``.
        metric: name that the student's validation logs, by which teacher and student are compared; None: what
            a checkpoint or early stopping monitors, else the first one.
        mode: ``"max"`` or ``"min"``; None: ``"min"`` for losses and errors.
        record: of a student that was pruned before; that of the callback is found by itself.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> Distillation("dense.ckpt", alpha=0.5, beta=Ramp(1000, 0), submodule="net").weights(0.5)
        {'task': 1.0, 'hinton': 0.5, 'attention': 500.0, 'fsp': 0.0}
    """

    def __init__(
        self,
        teacher: str | Path | nn.Module,
        alpha: Weight = 0.0,
        beta: Weight = 0.0,
        lambda_: Weight = 0.0,
        alpha_task: Weight = 1.0,
        temperature: float = 4.0,
        kind: Kind = "multiclass",
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
    ) -> None:
        check_choice("kind", kind, get_args(Kind))
        check_choice("precision", precision, get_args(Precision))
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.parts = {"task": alpha_task, "hinton": alpha, "attention": beta, "fsp": lambda_}
        for name, argument in zip(self.parts, ("alpha_task", "alpha", "beta", "lambda_"), strict=True):
            _check_weight(argument, self.parts[name])
        self.teacher, self.temperature, self.kind, self.precision = teacher, temperature, kind, precision
        self.taps, self.teacher_taps, self.flows, self.submodule = taps, teacher_taps, flows, submodule
        self.ignore_index, self.labels, self.logits = ignore_index, labels, logits or logits_of
        self.metric, self.mode, self.record = metric, mode, record
        self.callback: L.Callback | None = None  # made by the mixin

    @property
    def wanted(self) -> list[str]:
        """The losses whose weight is not 0 from beginning to end."""
        return [
            name for name, weight in self.parts.items() if name != "task" and (callable(weight) or weight)
        ]

    @property
    def needs_taps(self) -> bool:
        """Whether features are compared."""
        return bool({"attention", "fsp"} & set(self.wanted))

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of every part when ``progress`` (0 to 1) of the training is over."""
        return {
            name: float(weight(progress) if callable(weight) else weight)
            for name, weight in self.parts.items()
        }

    def labels_of(self, batch: Any) -> Tensor | None:
        """The labels of a batch, None if nobody asks.

        Raises:
            ValueError: they are not where they are expected.
        """
        if self.ignore_index is None:
            return None
        if self.labels is not None:
            return self.labels(batch)
        if isinstance(batch, Sequence) and len(batch) > 1 and isinstance(batch[1], Tensor):
            return batch[1]
        raise ValueError(
            f"no labels in a batch of type {type(batch).__name__}: pass labels=, which finds them in it"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Distillation:
        return self  # copies of the module (a moving average, say) share the one teacher


def _check_weight(name: str, weight: Weight) -> None:
    """Weights are not negative; schedules are tried at their ends and in the middle."""
    tried = [weight(progress) for progress in (0.0, 0.5, 1.0)] if callable(weight) else [weight]
    if any(not value >= 0 for value in tried):
        raise ValueError(f"{name} must not be negative, got {min(tried)}")
