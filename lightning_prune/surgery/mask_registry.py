"""The checks of operators by masks, by operator; :mod:`.mask_check` says what they show."""

from __future__ import annotations

from collections.abc import Callable

from torch._ops import OpOverload

from lightning_prune.surgery.masks import Masks
from lightning_prune.tracing.tracker import TracedOperator

__all__ = ["CHECKS", "MaskCheck", "checks"]

#: Whether the call of the smaller network is right: takes dense call, small call, masks of operands and of results.
MaskCheck = Callable[[TracedOperator, TracedOperator, Masks, Masks], bool]
#: Operator -> its check, and the positions of the arguments that may change with the cut.
CHECKS: dict[OpOverload, tuple[MaskCheck, tuple[int, ...]]] = {}


def checks(*operators: OpOverload, variable: tuple[int, ...] = ()) -> Callable[[MaskCheck], MaskCheck]:
    """Register a function as the check of ``operators``, whose arguments at ``variable`` may change with the cut."""

    def register(function: MaskCheck) -> MaskCheck:
        CHECKS.update(dict.fromkeys(operators, (function, variable)))
        return function

    return register
