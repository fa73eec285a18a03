"""Tell from the bytecode of a network which dimensions of a shape it uses where it reads the shape.

``x.shape[2:]`` uses two, ``n, _, h, w = x.shape`` those whose variables are used, and ``x.shape[1] == 0`` none, but
whether the dimension is empty. Whatever is not clear uses all of them.
"""

from __future__ import annotations

import dis
from functools import lru_cache
from types import CodeType
from typing import Any

__all__ = ["dim_compared_with_zero", "is_size_compared_with_zero", "used_dims"]

#: Names by which code reads its own variables.
_OWN_VARIABLES = frozenset(("locals", "eval", "exec"))


@lru_cache(maxsize=4096)
def used_dims(code: CodeType, place: int, rank: int) -> tuple[int, ...]:
    """Return the dimensions of a shape that what follows its read at ``place`` uses; all if that is unclear."""
    everything = tuple(range(rank))
    if not _is_read_here(code, place):
        return everything  # another function reads it, and may return something else
    following = _after(code, place)[:4]
    if len(following) < 2:
        return everything
    first, second = following[:2]
    if _is_constant(first) and _is_subscript(second) and isinstance(first.argval, (int, slice)):
        chosen = everything[first.argval] if _is_within(first.argval, rank) else everything
        return chosen if isinstance(chosen, tuple) else (chosen,)
    if all(_is_constant(each) for each in (first, second)) and _slices(following[2:]):
        return everything[first.argval : second.argval]
    if first.opname == "UNPACK_SEQUENCE" and first.argval == rank:
        return _used_names(code, first.offset, rank)
    return everything


@lru_cache(maxsize=4096)
def dim_compared_with_zero(code: CodeType, place: int, rank: int) -> int | None:
    """Return the dimension of a shape whose size, read at ``place``, is only compared with 0; else None."""
    following = _after(code, place)
    if len(following) < 4 or not _is_read_here(code, place):
        return None
    index, subscript = following[:2]
    if not (_is_constant(index) and type(index.argval) is int and _is_within(index.argval, rank)):
        return None
    return index.argval % rank if _is_subscript(subscript) and _is_comparison(following[2:]) else None


@lru_cache(maxsize=4096)
def is_size_compared_with_zero(code: CodeType, place: int) -> bool:
    """Whether the instruction at ``place`` is ``.size(1)``, or another constant, which is compared with 0."""
    until = [each for each in _instructions(code) if each.offset <= place and each.opname not in _FILLERS][
        -3:
    ]
    if len(until) < 3 or not _is_comparison(_after(code, place)):
        return False
    method, number, call = until
    is_call = call.opname == "CALL" and call.argval == 1 and _is_constant(number)
    return is_call and method.opname in ("LOAD_METHOD", "LOAD_ATTR") and method.argval == "size"


def _after(code: CodeType, place: int) -> list[dis.Instruction]:
    """Return the instructions behind ``place``, without those that do nothing."""
    return [each for each in _instructions(code) if each.offset > place and each.opname not in _FILLERS]


def _is_comparison(steps: list[dis.Instruction]) -> bool:
    """Whether the next instructions compare what has been read with 0."""
    is_zero = (
        len(steps) > 1 and _is_constant(steps[0]) and type(steps[0].argval) is int and not steps[0].argval
    )
    return is_zero and steps[1].opname == "COMPARE_OP"


def _is_read_here(code: CodeType, place: int) -> bool:
    """Whether the instruction at ``place`` is ``.shape`` itself, or the call of ``.size()``."""
    until = [each for each in _instructions(code) if each.offset <= place and each.opname not in _FILLERS]
    *_, before, last = (None, *until)
    if last is None or last.opname == "LOAD_ATTR":
        return last is not None and last.argval == "shape"
    is_method = before is not None and before.opname in ("LOAD_METHOD", "LOAD_ATTR")
    return is_method and last.opname == "CALL" and last.argval == 0 and before.argval == "size"


_FILLERS = {"CACHE", "PRECALL", "NOP", "RESUME", "EXTENDED_ARG", "NOT_TAKEN"}


@lru_cache(maxsize=1024)
def _instructions(code: CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))


def _is_within(index: Any, rank: int) -> bool:
    """Whether an index, or a slice, can be taken of ``rank`` items."""
    return isinstance(index, slice) or -rank <= index < rank


def _is_constant(instruction: dis.Instruction) -> bool:
    return instruction.opname in ("LOAD_CONST", "LOAD_SMALL_INT")


def _is_subscript(instruction: dis.Instruction) -> bool:
    return instruction.opname == "BINARY_SUBSCR" or (
        instruction.opname == "BINARY_OP" and instruction.argrepr == "[]"
    )


def _slices(instructions: list[dis.Instruction]) -> bool:
    """Whether a slice is made of two constants and taken."""
    if not instructions:
        return False
    if instructions[0].opname == "BINARY_SLICE":
        return True
    made = instructions[0].opname == "BUILD_SLICE" and instructions[0].argval == 2
    return made and len(instructions) > 1 and _is_subscript(instructions[1])


def _used_names(code: CodeType, place: int, rank: int) -> tuple[int, ...]:
    """Return the positions whose variables are used anywhere, of those to which a shape is assigned at ``place``."""
    names: list[str] = []
    for each in _after(code, place):
        if each.opname == "STORE_FAST":
            names.append(each.argval)
        elif each.opname == "STORE_FAST_STORE_FAST":
            names += each.argval
        elif each.opname == "STORE_FAST_LOAD_FAST":
            names.append(each.argval[0])
        elif each.opname == "POP_TOP":  # a name that the next one overwrites, from Python 3.13 on
            names.append("")
        else:
            break
        if len(names) >= rank:
            break
    if len(names) != rank or not _OWN_VARIABLES.isdisjoint(code.co_names):
        return tuple(range(rank))
    used = {
        name
        for each in _instructions(code)
        if not each.opname.startswith("STORE_FAST") or "LOAD" in each.opname
        for name in (each.argval if isinstance(each.argval, tuple) else (each.argval,))
        if isinstance(name, str)
        and ("FAST" in each.opname or "DEREF" in each.opname or "CLOSURE" in each.opname)
    }
    return tuple(dim for dim, name in enumerate(names) if name in used)
