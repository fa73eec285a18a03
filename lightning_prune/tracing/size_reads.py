"""Note which sizes of tensors, and which size attributes of modules, the code of a network reads in a forward.

Python code can take another branch, or compute another number, only from what it reads. If it reads nothing that a
cut changes, the smaller network runs the same operators in the same order, and its forward need not be run to know
them. Reads come through the function mode (``x.shape``, ``x.size(1)``, ``len(x)``) and through properties that stand
in for size attributes while a forward is recorded. The code at the place of the read says which dimensions it uses:
``x.shape[2:]`` and ``n, _, h, w = x.shape`` use no channels.
"""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.tracing.passed_reads import is_passed_on
from lightning_prune.utils.module_walk import modules_of

__all__ = ["GUARDED", "SizeReads", "attribute_reads", "hides_reads"]

#: Attributes that hold a number of channels in the layers of torch, whose reads are noted.
GUARDED = (
    *("in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "groups"),
    *("num_groups", "normalized_shape", "num_embeddings", "embedding_dim", "num_parameters"),
)
#: Functions of torch that read a whole shape and use its last dimensions only: number of these.
_SPATIAL_ONLY: dict[CodeType, int] = {
    function.__code__: rank
    for rank, functions in {
        1: (F.adaptive_avg_pool1d, F.adaptive_max_pool1d_with_indices),
        2: (F.adaptive_avg_pool2d, F.adaptive_max_pool2d_with_indices),
        3: (F.adaptive_avg_pool3d, F.adaptive_max_pool3d_with_indices),
    }.items()
    for function in functions
    if isinstance(function, FunctionType)
}
#: Getters and methods of tensors whose results do not depend on sizes; ``len`` is noted elsewhere.
_SIZELESS = {
    *(Tensor.dim, Tensor.ndimension, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous),
    *(
        Tensor.get_device,
        Tensor.__hash__,
        Tensor.__len__,
        torch.is_floating_point,
        torch.is_complex,
        torch.is_tensor,
    ),
    *(
        getattr(Tensor, name).__get__
        for name in ("ndim", "dtype", "device", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda")
    ),
    *(
        getattr(Tensor, name).__get__
        for name in ("is_cpu", "is_meta", "is_quantized", "is_sparse", "is_nested")
    ),
}
#: Names by which code reads attributes past the properties, or runs code that nothing here sees.
_HIDING = frozenset(("vars", "__dict__", "__getattribute__"))
#: Methods that no forward runs.
_ASIDE = frozenset(("__repr__", "__getstate__", "__setstate__", "__reduce__", "__init_subclass__"))
#: Packages whose code no forward runs, or is known.
_KNOWN = frozenset(("torch", "builtins", "abc", "typing", "collections", "huggingface_hub"))


@dataclass
class SizeReads:
    """What the code has read.

    Attributes:
        dims: tensors, each with the dimensions whose sizes were used.
        attributes: ``(id of a module, name)`` of each size attribute that code other than torch's layers has read.
    """

    dims: list[tuple[Tensor, tuple[int, ...]]] = field(default_factory=list)
    attributes: set[tuple[int, str]] = field(default_factory=set)

    def add_shape(self, tensor: Tensor, frame: FrameType) -> None:
        """Note that the code of ``frame`` reads the shape of a tensor."""
        everything = tuple(range(tensor.dim()))
        if (rank := _SPATIAL_ONLY.get(frame.f_code)) is not None:
            used = everything[-rank:]
        else:
            used = _used(frame.f_code, frame.f_lasti, len(everything))
        self.dims.append((tensor, used))

    def add(self, tensor: Tensor, *dims: int) -> None:
        """Note that the sizes of some dimensions of a tensor are read."""
        self.dims.append((tensor, tuple(int.__int__(dim) % max(tensor.dim(), 1) for dim in dims)))

    def add_result(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        """Note all sizes of the arguments of a call whose result is no tensor, unless it does not depend on them."""
        if type(out) is Tensor or out is None or func in _SIZELESS:
            return
        if isinstance(out, (tuple, list)) and all(isinstance(item, Tensor) for item in out):
            return  # the operator that made them shows how many there are
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor) and not isinstance(out, Tensor):
                    self.add(tensor, *range(tensor.dim()))


@lru_cache(maxsize=4096)
def _used(code: CodeType, place: int, rank: int) -> tuple[int, ...]:
    """Return the dimensions of a shape that what follows its read at ``place`` uses; all if that is unclear."""
    everything = tuple(range(rank))
    following = [each for each in _instructions(code) if each.offset > place and each.opname not in _FILLERS][
        :4
    ]
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
    stores = [each for each in _instructions(code) if each.offset > place and each.opname not in _FILLERS]
    names: list[str] = []
    for each in stores:
        if each.opname == "STORE_FAST":
            names.append(each.argval)
        elif each.opname == "STORE_FAST_STORE_FAST":
            names += each.argval
        if len(names) >= rank or not each.opname.startswith("STORE_FAST"):
            break
    if len(names) != rank:
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


# -- attributes ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attribute_reads(reads: SizeReads) -> Iterator[None]:
    """Note every read of a size attribute of any module within the block."""
    before = {name: vars(nn.Module)[name] for name in GUARDED if name in vars(nn.Module)}
    for name in GUARDED:
        setattr(nn.Module, name, _property(name, reads))
    try:
        yield
    finally:
        for name in GUARDED:
            if name in before:
                setattr(nn.Module, name, before[name])
            else:
                delattr(nn.Module, name)


def _property(name: str, reads: SizeReads) -> property:
    """Return a property that stands in for an attribute that modules keep in their dictionaries."""

    def get(module: nn.Module) -> Any:
        try:
            value = vars(module)[name]
        except KeyError:
            return _inherited(module, name)
        if not is_passed_on(sys._getframe(1), name):
            reads.attributes.add((id(module), name))
        return value

    def put(module: nn.Module, value: Any) -> None:
        vars(module)[name] = value

    def remove(module: nn.Module) -> None:
        if name not in vars(module):
            raise AttributeError(name)
        del vars(module)[name]

    return property(get, put, remove)


def _inherited(module: nn.Module, name: str) -> Any:
    """Return what a class behind ``nn.Module`` defines, as if there were no property; else raise AttributeError."""
    kinds = type(module).__mro__
    for kind in kinds[kinds.index(nn.Module) + 1 :]:
        if name in vars(kind):
            return getattr(super(nn.Module, module), name)
    raise AttributeError(name)  # Python then asks ``__getattr__`` for parameters, buffers and submodules


# -- code that nothing here sees ------------------------------------------------------------------------------


def hides_reads(model: nn.Module) -> bool:
    """Return whether the files that define the network's classes have code that may read sizes unseen.

    Such are TorchScript functions, and code that looks into the dictionaries of objects.
    """
    return any(map(_class_hides, {type(module) for module in modules_of(model)}))


def _class_hides(kind: type) -> bool:
    return issubclass(kind, torch.jit.ScriptModule) or any(map(_file_hides, _files_of(kind)))  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _files_of(kind: type) -> frozenset[str]:
    """Return the names of the Python modules that define a class and its bases, without those that are known."""
    names = {base.__module__ for base in kind.__mro__}
    return frozenset(name for name in names if name.partition(".")[0] not in _KNOWN)


def _file_hides(name: str) -> bool:
    file = sys.modules.get(name)
    return file is None or _scan(file, len(vars(file)))


@lru_cache(maxsize=1024)
def _scan(file: ModuleType, number_of_names: int) -> bool:
    for value in list(vars(file).values()):
        if isinstance(value, torch.jit.ScriptFunction):
            return True
        if (
            isinstance(value, FunctionType)
            and not value.__module__.startswith("torch.")
            and _hides(value.__code__)
        ):
            return True
        if isinstance(value, type) and value.__module__ == file.__name__ and any(map(_hides, _codes(value))):
            return True
    return False


def _codes(kind: type) -> Iterator[CodeType]:
    for member in list(vars(kind).values()):
        for part in (member, getattr(member, "__func__", None), getattr(member, "fget", None)):
            if isinstance(part, FunctionType):
                yield part.__code__


def _hides(code: CodeType) -> bool:
    if code.co_name in _ASIDE:
        return False
    if not _HIDING.isdisjoint(code.co_names):
        return True
    return any(_hides(constant) for constant in code.co_consts if isinstance(constant, CodeType))
