"""Tell whether code reads a size attribute only to pass it on to one operator, as in ``F.layer_norm(x, self.shape)``.

The operator is recorded with what it got, so such a read needs no further note: whoever checks the operator checks
the number. The code around the read must be the call of a function of torch that does nothing else with it.
"""

from __future__ import annotations

import dis
from collections.abc import Iterable, Sequence
from functools import lru_cache
from types import CodeType, FrameType

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["is_passed_on"]

#: Code of torch that passes a size attribute to one operator and does nothing else with it.
_PASSING = {
    nn.Conv1d._conv_forward.__code__,
    nn.Conv2d._conv_forward.__code__,
    nn.Conv3d._conv_forward.__code__,
}
#: Functions that hand their arguments to one operator.
_TAKING = (F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.conv1d, F.conv2d, F.conv3d)
_CALLS = ("CALL", "CALL_KW", "CALL_FUNCTION", "CALL_METHOD")
_LOADS = (
    "LOAD_FAST",
    "LOAD_CONST",
    "LOAD_SMALL_INT",
    "LOAD_GLOBAL",
    "LOAD_ATTR",
    "LOAD_METHOD",
    "LOAD_DEREF",
)


def is_passed_on(frame: FrameType, name: str) -> bool:
    """Return whether what ``frame`` reads now, the attribute ``name``, is an argument of such a function alone."""
    if frame.f_code in _PASSING:
        return True
    callee = _callee(frame.f_code, frame.f_lasti, name)
    if callee is None:
        return False
    first, *between, last = callee
    module = frame.f_globals.get(first)
    for each in between:
        module = getattr(module, each, None) if module in (torch, torch.nn) else None
    return (module is F or module is torch) and any(getattr(module, last, None) is f for f in _TAKING)


@lru_cache(maxsize=4096)
def _callee(code: CodeType, place: int, name: str) -> tuple[str, ...] | None:
    """Return the path, such as ``("nn", "functional", "layer_norm")``, of the function whose argument is read.

    Returns:
        None if it is not clear that what is read at ``place`` is an argument of a function of a module.
    """
    steps = [each for each in dis.get_instructions(code) if each.opname not in _FILLERS]
    at = next((i for i, each in enumerate(steps) if each.offset == place), None)
    if at is None or steps[at].opname != "LOAD_ATTR" or steps[at].argval != name:
        return None
    if steps[at + 1].opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return None  # what is passed is not the number itself
    end = next((i for i in range(at, len(steps)) if not steps[i].opname.startswith(_LOADS)), None)
    if end is None or steps[end].opname not in _CALLS:
        return None
    # The callee is below as many values as the call takes: another function may get one of torch's as its argument.
    for start in range(at - 1, 0, -1):
        if not steps[start].opname.startswith(_LOADS):
            return None
        names = steps[end].opname == "CALL_KW"  # the names of keywords are on the stack as well
        is_callee = _pushed(steps[start + 1 : end]) == steps[end].argval + names
        if is_callee and (path := _path(steps[: start + 1])) is not None:
            return path
    return None


def _path(steps: Sequence[dis.Instruction]) -> tuple[str, ...] | None:
    """Return the names of a global and of the attributes that the last steps load of it; None for anything else."""
    names: list[str] = []
    for each in reversed(steps):
        names.append(str(each.argval))
        if each.opname == "LOAD_GLOBAL":
            return tuple(reversed(names)) if len(names) > 1 else None
        if each.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            break
    return None


_FILLERS = ("CACHE", "PRECALL", "NOP", "RESUME", "EXTENDED_ARG", "NOT_TAKEN", "PUSH_NULL", "KW_NAMES")


def _pushed(steps: Iterable[dis.Instruction]) -> int:
    """Return how many values loads leave on the stack; an attribute takes the place of its owner."""
    return sum(
        max(each.opname.count("LOAD_FAST"), 1)
        for each in steps
        if each.opname not in ("LOAD_ATTR", "LOAD_METHOD")
    )
