"""Run a network's forward without data and write down every operator (level 1).

Meta and fake tensors have shapes but no data, so a recording costs no arithmetic and no memory. Meta tensors are
several times quicker; where a network does not run on them, fake tensors, which keep up appearances (a device,
say), are tried, and where values are needed, the real ones. Two modes listen: a ``TorchDispatchMode`` sees each
ATen operator, a ``TorchFunctionMode`` outside it sees the Python-level call with its arguments as they were
passed, traced ints included.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from lightning_prune.calls import Call, PythonCall, Recording, tensors_in
from lightning_prune.letters import two_tensors
from lightning_prune.shapes import quick
from lightning_prune.sizes import Shape, TracedInt, listening, trace_attributes
from lightning_prune.untouched import untouched

__all__ = ["raised_in", "record"]

# What fake tensors cannot answer: a branch on a value, a shape that depends on values, an operator without
# a shape function. Then the network is run for real.
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
NEEDS_DATA = ("no fake impl registered", "not supported for tensor subclasses", "access data pointer")
aten = torch.ops.aten
_LEAVING = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
_SIZE_GETTERS = (Tensor.shape.__get__, Tensor.size)  # type: ignore[attr-defined]
Means = Literal["meta", "fake", "real"]
RAISED_IN = "raised in module "  # the note that an exception of the forward gets
_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")
_OURS = __name__.split(".")[0]


def raised_in(error: BaseException) -> str:
    """Name of the innermost module whose forward raised ``error``."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(RAISED_IN)]
    return notes[0].removeprefix(RAISED_IN) if notes else ""


class _Where:
    """The stack of running modules, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.failed: str | None = None

    @property
    def module(self) -> str:
        return self.stack[-1] if self.stack else ""

    def enter(self, module: nn.Module, args: Any) -> None:
        self.stack.append(self.names.get(id(module), type(module).__name__))

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        if self.failed is None and sys.exc_info()[1] is not None:
            self.failed = self.module  # torch calls this hook also when the module raises, innermost first
        self.stack.pop()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
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
    while frame is not None and frame.f_code is not _run.__code__:
        module = frame.f_globals.get("__name__", "").split(".")[0]
        if module not in ("torch", "contextlib", _OURS):
            return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class _PythonCalls(TorchFunctionMode):
    """Remembers the running Python-level call, and answers sizes with traced ints."""

    operators: _Operators
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
        return TracedInt(answer, Shape(tensor, dim, answer))
    return torch.Size([TracedInt(size, Shape(tensor, dim, size)) for dim, size in enumerate(answer)])


class _Operators(TorchDispatchMode):
    """Writes down every operator that has a tensor among its results or arguments."""

    def __init__(self, python: _PythonCalls, where: _Where, means: Means) -> None:
        super().__init__()
        self.python, self.where, self.means = python, where, means
        self.calls: list[Call] = []
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
        self.calls.append(Call(op, args, kwargs, out, self.where.module, python, _line()))

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


def _prepared(means: Means, mode: FakeTensorMode, value: Any) -> Any:
    """The example input as the chosen means want it."""
    if means == "meta":
        return tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), value)
    return tree_map_only(Tensor, mode.from_tensor, value) if means == "fake" else copy.deepcopy(value)


def _run(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool, means: Means
) -> Recording:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    where, python = _Where(model), _PythonCalls()
    operators = python.operators = _Operators(python, where, means)
    inputs, kwargs = _prepared(means, fake, (inputs, dict(kwargs)))
    model.train(
        not training
    )  # networks that cache what they compute in eval mode drop it on a change of mode
    model.train(training)
    trace_attributes(model)
    mode = fake if means == "fake" else contextlib.nullcontext()
    try:
        with listening() as heard, torch.no_grad(), mode, where.watching(), python, operators:
            out = model(*inputs, **kwargs)
    except Exception as error:
        error.add_note(f"{RAISED_IN}{where.failed or ''}")
        raise
    found = operators.calls, tensors_in(out), training, means == "real"
    return Recording(*found, heard.floats, heard.numbers, python.left)


@contextlib.contextmanager
def _seen_whole() -> Iterator[None]:
    """See into what torch would hide, and keep it from logging what we raise anyway.

    ``nn.MultiheadAttention`` has a fast path of one opaque operator; and a Python function of
    ``torch.nn.functional`` that meets a function mode is handed over whole, so that the calls inside it are lost.
    """
    enabled, level = torch.backends.mha.get_fastpath_enabled(), _FAKE_LOG.level
    torch.backends.mha.set_fastpath_enabled(False)
    _FAKE_LOG.setLevel(logging.CRITICAL)
    checks = {name: check for name, check in vars(F).items() if name.startswith("has_torch_function")}
    vars(F).update(dict.fromkeys(checks, lambda *args: False))
    # Norms want several values per channel in train mode; without data one is as good.
    checks |= {name: getattr(F, name) for name in ("_verify_batch_size", "_verify_spatial_size")}
    vars(F).update(dict.fromkeys(list(checks)[-2:], lambda size: None))
    try:
        yield
    finally:
        vars(F).update(checks)
        torch.backends.mha.set_fastpath_enabled(enabled)
        _FAKE_LOG.setLevel(level)


def record(model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> Recording:
    """Record one forward of ``model`` in eval or train mode, and leave the model as it was.

    Where the forward needs values (a branch on a tensor), a copy of the inputs is run for real, and the
    branch that they take is the one recorded.

    Raises:
        Exception: the forward's own, with a note that names the module.
    """
    means: Means
    for means in ("meta", "fake"):
        try:
            with untouched(model), _seen_whole():
                return _run(model, inputs, kwargs, training, means)
        except Exception as error:
            if means == "fake" and not _needs_values(error):
                raise
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with untouched(model), _seen_whole():
        try:
            return _run(model, inputs, kwargs, training, "real")
        finally:
            for buffer, value in buffers:
                buffer.data.copy_(value)


def _needs_values(error: Exception) -> bool:
    """Whether fake tensors cannot answer: a branch on a value, a custom operator without a shape function, numpy."""
    return isinstance(error, NEEDS_VALUES) or any(what in str(error) for what in NEEDS_DATA)
