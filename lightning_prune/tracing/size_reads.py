"""Note which sizes of tensors, and which size attributes of modules, the code of a network reads in a forward.

Python code can take another branch, or compute another number, only from what it reads. If it reads nothing that a
cut changes, the smaller network runs the same operators in the same order, and its forward need not be run to know
them. Reads come through the function mode (``x.shape``, ``x.size(1)``, ``len(x)``) and through properties that stand
in for size attributes while a forward is recorded. The code at the place of the read says which dimensions it uses:
``x.shape[2:]`` and ``n, _, h, w = x.shape`` use no channels.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn import functional as F

from lightning_prune.tracing.passed_reads import is_passed_on
from lightning_prune.tracing.shape_bytecode import (
    dim_compared_with_zero,
    is_size_compared_with_zero,
    used_dims,
)

__all__ = ["GUARDED", "SizeReads", "attribute_reads"]

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
#: Functions of torch that read shapes only to refuse norms over a single value per channel, which is the same for
#: any number of channels. (Groups of a group norm may become so small; its other sizes are of the data.)
_WITHOUT_CHANNELS = {function.__code__ for function in (F.batch_norm, F.group_norm, F.instance_norm)}
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
#: Setter by which a tensor becomes another one, under the same identity.
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
#: Namespaces of operators whose kernels are not code of the user.
_OPERATORS = ("aten", "prim", "prims", "torchvision")


@dataclass
class SizeReads:
    """What the code has read.

    Attributes:
        dims: tensors, each with the dimensions whose sizes were used.
        emptiness: tensors, each with a dimension of which the code has asked only whether it is empty.
        attributes: ``(id of a module, name)`` of each size attribute that code other than torch's layers has read.
        ends: tensors that the network was given, and those that it returned.
        unclear: whether code ran that may have read any size: what is in ``dims`` and ``attributes`` is not all.
    """

    dims: list[tuple[Tensor, tuple[int, ...]]] = field(default_factory=list)
    emptiness: list[tuple[Tensor, int]] = field(default_factory=list)
    attributes: set[tuple[int, str]] = field(default_factory=set)
    ends: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    unclear: bool = False

    def add_call(self, func: Any, types: Any, args: tuple[Any, ...]) -> None:
        """Note what a call may hide: code of tensor classes and of operators, a read that gives a tensor."""
        foreign = isinstance(func, (OpOverload, OpOverloadPacket)) and _namespace(func) not in _OPERATORS
        if foreign or func == _SET_DATA or any(map(_has_code, types)):
            self.unclear = True
        if func is torch._shape_as_tensor:
            self.add(args[0], *range(args[0].dim()))

    def add_shape(self, tensor: Tensor, frame: FrameType) -> None:
        """Note that the code of ``frame`` reads the shape of a tensor."""
        everything = tuple(range(tensor.dim()))
        if (rank := _SPATIAL_ONLY.get(frame.f_code)) is not None:
            used = everything[-rank:]
        elif frame.f_code in _WITHOUT_CHANNELS:
            used = everything[:1] + everything[2:]
        elif (dim := dim_compared_with_zero(frame.f_code, frame.f_lasti, len(everything))) is not None:
            self.emptiness.append((tensor, dim))
            return
        else:
            used = used_dims(frame.f_code, frame.f_lasti, len(everything))
        self.dims.append((tensor, used))

    def add_size(self, tensor: Tensor, dim: int, frame: FrameType) -> None:
        """Note that the code of ``frame`` asks a tensor for one of its sizes."""
        dim = int.__int__(dim) % max(tensor.dim(), 1)
        if is_size_compared_with_zero(frame.f_code, frame.f_lasti):
            self.emptiness.append((tensor, dim))
        elif frame.f_code not in _WITHOUT_CHANNELS or dim != 1:
            self.add(tensor, dim)

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


@cache
def _has_code(kind: Any) -> bool:
    """Whether a class of tensors runs Python code of its own for each call."""
    return kind is not Tensor and kind.__torch_function__ is not torch._C._disabled_torch_function_impl


def _namespace(operator: Any) -> str:
    packet = operator if isinstance(operator, OpOverloadPacket) else operator._overloadpacket
    return str(packet._qualified_op_name.partition("::")[0])


# -- attributes ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attribute_reads(reads: SizeReads) -> Iterator[None]:
    """Note every read of a size attribute of any module within the block."""
    stand_ins: list[tuple[Any, str, Any]] = [(nn.Module, name, _property(name, reads)) for name in GUARDED]
    # A text (which begins with the name) or a copy of a module has its sizes; TorchScript and other threads read
    # sizes of tensors unseen.
    stand_ins += [
        (owner, name, _noting(getattr(owner, name), reads))
        for owner, name in (
            *((nn.Module, name) for name in ("_get_name", "__reduce_ex__")),
            *((threading.Thread, "start"), (ThreadPoolExecutor, "submit")),
            *((kind, "__call__") for kind in (torch.jit.ScriptFunction, torch._C.ScriptMethod)),
        )
    ]
    before = [vars(owner).get(name, _ABSENT) for owner, name, _ in stand_ins]
    for stand_in in stand_ins:
        setattr(*stand_in)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(stand_ins, before, strict=True):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


_ABSENT = object()


def _noting(method: Callable[..., Any], reads: SizeReads) -> Callable[..., Any]:
    """Return a method that does the same, and notes that it may have read any size."""

    def call(*args: Any, **kwargs: Any) -> Any:
        reads.unclear = True
        return method(*args, **kwargs)

    return call


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
