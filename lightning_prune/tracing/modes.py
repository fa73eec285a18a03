"""The two modes that listen to a forward, and where in the network it is (level 1).

A ``TorchDispatchMode`` sees each ATen operator, a ``TorchFunctionMode`` outside it sees the Python-level call with
its arguments as they were passed, traced ints included.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_prune.tracing.calls import OperatorCall, PythonCall
from lightning_prune.tracing.einsum import two_tensors
from lightning_prune.tracing.shape_functions import quick
from lightning_prune.tracing.traced_int import TensorSize, TracedInt

__all__ = ["Means", "ModuleStack", "Operators", "PythonCalls"]

aten = torch.ops.aten
Means = Literal["meta", "fake", "real"]
_LEAVING = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
_SIZE_GETTERS = (Tensor.shape.__get__, Tensor.size)  # type: ignore[attr-defined]
_OURS = __name__.split(".")[0]
_RECORDING = f"{_OURS}.recording"  # where a recorded forward is called from


class ModuleStack:
    """The stack of running modules, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.failed: str | None = None

    @property
    def module(self) -> str:
        """Name of the innermost one."""
        return self.stack[-1] if self.stack else ""

    def enter(self, module: nn.Module, args: Any) -> None:
        """The forward of ``module`` begins."""
        self.stack.append(self.names.get(id(module), type(module).__name__))

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """The forward of ``module`` ends, or raises."""
        if self.failed is None and sys.exc_info()[1] is not None:
            self.failed = self.module  # torch calls this hook also when the module raises, innermost first
        self.stack.pop()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the forwards within the block."""
        before = register_module_forward_pre_hook(self.enter)
        after = register_module_forward_hook(self.leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()


def _line() -> str:
    """``file.py:12`` of the innermost frame of the network's own code, outside torch and this package."""
    frame = sys._getframe(2)
    while frame is not None and (module := frame.f_globals.get("__name__", "")) != _RECORDING:
        if module.split(".")[0] not in ("torch", "contextlib", _OURS):
            return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class PythonCalls(TorchFunctionMode):
    """Remembers the running Python-level call, and answers sizes with traced ints."""

    operators: Operators
    current: PythonCall | None = None

    def __init__(self) -> None:
        super().__init__()
        self.left: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LEAVING:
            self.left.append(args[0])
        if func in _SIZE_GETTERS:
            return _traced_sizes(args[0], func(*args, **kwargs), *args[1:], **kwargs)
        outer, self.current = self.current, PythonCall(func, args, kwargs)
        try:
            if func is F.scaled_dot_product_attention and self.operators.means == "meta":
                return self.operators.attention(*args, **kwargs)
            if (whole := _whole(func, args, kwargs)) is not None:
                return self.operators.whole(*whole)
            return func(*args, **kwargs)
        finally:
            self.current = outer


def _whole(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[OpOverload, tuple[Any, ...]] | None:
    """The operator for a call that torch takes apart, in ways that hang on sizes or hide what was meant."""
    if func is torch.einsum and (contraction := two_tensors(args)) is not None:
        return aten.einsum.default, contraction
    if func is torch._C._nn.pad and "circular" in args:
        return aten.pad.default, args
    sections = kwargs.get("indices_or_sections", kwargs.get("sections", args[1] if len(args) > 1 else None))
    if func in (torch.tensor_split, Tensor.tensor_split) and isinstance(sections, int):
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        return aten.tensor_split.sections, (args[0], int.__int__(sections), int.__int__(dim))
    return None


def _traced_sizes(tensor: Tensor, answer: Any, *at: Any, **kwargs: Any) -> Any:
    """``answer`` of ``tensor.shape``, ``.size()`` or ``.size(dim)`` as traced ints."""
    if isinstance(answer, int):
        dim = int(at[0] if at else kwargs["dim"]) % tensor.dim()
        return TracedInt(answer, TensorSize(tensor, dim, answer))
    return torch.Size([TracedInt(size, TensorSize(tensor, dim, size)) for dim, size in enumerate(answer)])


class Operators(TorchDispatchMode):
    """Writes down every operator that has a tensor among its results or arguments."""

    def __init__(self, python: PythonCalls, where: ModuleStack, means: Means) -> None:
        super().__init__()
        self.python, self.where, self.means = python, where, means
        self.calls: list[OperatorCall] = []
        self.twins: dict[int, tuple[Tensor, Tensor]] = {}
        self.silent = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard that torch would wrap around the next method costs as much as the method

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.means == "meta":
            given = tuple(self._given(leaf) for leaf in args)
            named = {name: self._given(leaf) for name, leaf in kwargs.items()}
            out = quick(func, given, named)
            out = func(*given, **named) if out is NotImplemented else out
        else:
            out = func(*args, **kwargs)
        if func.namespace != "prim" and not self.silent:  # prim.device and the like return no tensor
            self.write(func, args, kwargs, out)
        return out

    def write(self, op: OpOverload, args: Any, kwargs: Any, out: Any) -> None:
        """Note one operator. What TorchScript calls was not called from Python: its sizes are written in its code."""
        python = self.python.current or PythonCall(op.overloadpacket, args, kwargs)
        self.calls.append(OperatorCall(op, args, kwargs, out, self.where.module, python, _line()))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Fused attention as one operator: on the meta device torch would take it apart."""
        with _disable_current_modes():
            out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device="meta")
        self.write(
            torch.ops.aten.scaled_dot_product_attention.default, (query, key, value, *args), kwargs, out
        )
        return out

    def whole(self, op: OpOverload, args: tuple[Any, ...]) -> Any:
        """Write one operator down, and not what torch makes of it."""
        self.silent = True
        try:
            out = op(*args)
        finally:
            self.silent = False
        self.write(op, args, {}, out)
        return out

    def _given(self, argument: Any) -> Any:
        """The argument with every tensor on the meta device; what a schema allows is flat, or a list."""
        if isinstance(argument, Tensor):
            return self._twin(argument)
        return [self._given(item) for item in argument] if isinstance(argument, (list, tuple)) else argument

    def _twin(self, tensor: Tensor) -> Tensor:
        """A meta tensor in the place of a parameter, a buffer, or whatever else is real."""
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self.twins:
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self.twins[id(tensor)] = tensor, twin
        return self.twins[id(tensor)][1]
