"""The two torch modes that record a forward, and the stack of running modules.

A ``TorchDispatchMode`` receives each ATen operator. A ``TorchFunctionMode`` outside of it receives the Python-level
call with the arguments that the user's code passed, traced ints included.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lightning_prune.tracing.calls import ModuleCall, OperatorCall, PythonCall
from lightning_prune.tracing.direct_calls import DIRECT, is_undisturbed
from lightning_prune.tracing.einsum import contraction_arguments
from lightning_prune.tracing.shape_functions import infer
from lightning_prune.tracing.size_reads import SizeReads
from lightning_prune.tracing.traced_int import TensorSize, TracedInt
from lightning_prune.utils.module_walk import named_modules
from lightning_prune.utils.seeding import torch_generators

__all__ = ["ModuleStack", "OperatorMode", "PythonCallMode", "TensorKind"]

aten = torch.ops.aten
#: What a forward is recorded on: tensors without data (meta, fake), or real ones.
TensorKind = Literal["meta", "fake", "real"]
_NUMPY_GETTERS = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
_SIZE_GETTERS = (Tensor.shape.__get__, Tensor.size)  # type: ignore[attr-defined]
_COUNT_GETTERS = (Tensor.numel, Tensor.nelement, torch.numel)
#: Dropout of whole channels, for which torch makes the noise from sizes alone.
_CHANNEL_DROPOUTS = {
    torch.feature_dropout: aten.feature_dropout.default,
    torch.feature_dropout_: aten.feature_dropout_.default,
    torch.feature_alpha_dropout: aten.feature_alpha_dropout.default,
    torch.feature_alpha_dropout_: aten.feature_alpha_dropout_.default,
}
_PACKAGE = __name__.split(".")[0]
_RECORDER = f"{__package__}.recorder"  # this module calls the forward that is recorded


class ModuleStack:
    """The stack of modules whose forward is running, by name, and the names of all that have run."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in named_modules(model)}
        self.stack: list[str] = []
        self.failed_module: str | None = None
        self.entered: set[str] = set()
        self.calls: list[ModuleCall] = []
        self.operators: list[OperatorCall] = []
        self._running: list[ModuleCall] = []

    @property
    def innermost(self) -> str:
        """Name of the innermost running module; "" if none is running."""
        return self.stack[-1] if self.stack else ""

    def enter(self, module: nn.Module, args: Any) -> None:
        """Push ``module``, whose forward begins."""
        self.stack.append(self.names.get(id(module), type(module).__name__))
        self.entered.add(self.stack[-1])
        self._running.append(ModuleCall(self.stack[-1], len(self.operators), args))
        self.calls.append(self._running[-1])

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        """Pop ``module``, whose forward ends or raises; remember the innermost module that raised."""
        if self.failed_module is None and sys.exc_info()[1] is not None:
            self.failed_module = (
                self.innermost
            )  # torch calls this hook also on errors, innermost module first
        self.stack.pop()
        call = self._running.pop()
        call.end, call.out = len(self.operators), out

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Keep the stack up to date, by global hooks, within the block."""
        before = register_module_forward_pre_hook(self.enter)
        after = register_module_forward_hook(self.leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()


def _line() -> str:
    """Return ``file.py:12`` of the innermost frame of the network's code, outside of torch and this package."""
    frame = sys._getframe(2)
    while frame is not None:
        known = _FILES.get(id(frame.f_code))
        file = known[1] if known is not None else _file_of(frame)
        if file:
            return f"{file}:{frame.f_lineno}"
        if file is None:
            break
        frame = frame.f_back  # type: ignore[assignment]
    return ""


#: id of code -> the code, which keeps its id in use, and its file if it is the network's; "" for code of torch and
#: this package; None for what calls the forward. (The hash of code takes ten times as long as its id.)
_FILES: dict[int, tuple[CodeType, str | None]] = {}


def _file_of(frame: FrameType) -> str | None:
    """Return the entry of a frame's code in ``_FILES``, which is added."""
    module, code = frame.f_globals.get("__name__", ""), frame.f_code
    inside = module.split(".")[0] in ("torch", "contextlib", _PACKAGE)
    file = "" if inside else code.co_filename.rsplit("/", 1)[-1]
    _FILES[id(code)] = code, (None if module == _RECORDER else file)
    return _FILES[id(code)][1]


class PythonCallMode(TorchFunctionMode):
    """Keep the running Python-level call, and return sizes of tensors as traced ints."""

    operators: OperatorMode
    current: PythonCall | None = None

    def __init__(self) -> None:
        super().__init__()
        self.numpy_tensors: list[Tensor] = []
        self.reads = SizeReads()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NUMPY_GETTERS:
            self.numpy_tensors.append(args[0])
        if func in _SIZE_GETTERS:
            sizes = _traced_sizes(args[0], func(*args, **kwargs), *args[1:], **kwargs)
            if isinstance(sizes, TracedInt):
                self.reads.add_size(args[0], next(iter((*args[1:], *kwargs.values()))), sys._getframe(1))
            else:
                self.reads.add_shape(args[0], sys._getframe(1))
            return sizes
        if func in _COUNT_GETTERS:
            self.reads.add(args[0], *range(args[0].dim()))
            return math.prod(_traced_sizes(args[0], args[0].shape), start=1)
        if func is Tensor.__len__:
            self.reads.add(args[0], 0)
            int(_traced_sizes(args[0], func(*args), 0))  # `len` returns a plain int, as `int` does
        self.reads.add_call(func, types, args)
        outer, self.current = self.current, PythonCall(func, args, kwargs)
        try:
            if (direct := DIRECT.get(func)) is not None:
                out = self.operators.run_direct(direct, self.current)
                if out is not NotImplemented:
                    return out
            if func is F.scaled_dot_product_attention and self.operators.runs_attention(*args, **kwargs):
                return self.operators.run_attention(*args, **kwargs)
            if (composite := _composite(func, args, kwargs)) is not None:
                return self.operators.run_composite(*composite)
            out = func(*args, **kwargs)
            if type(out) is not Tensor:
                self.reads.add_result(func, args, kwargs, out)
            return out
        except Exception:
            self.reads.unclear = True  # whether it raises depends on sizes, and the network may go on
            raise
        finally:
            self.current = outer


def _composite(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[OpOverload, tuple[Any, ...]] | None:
    """Return operator and arguments of a call that must be recorded as one operator; None for any other call.

    Torch decomposes these calls in a way that depends on sizes, or that hides which channels belong together.
    """
    if func is torch.einsum and (contraction := contraction_arguments(args)) is not None:
        return aten.einsum.default, contraction
    if func is torch._C._nn.pad and "circular" in args:
        return aten.pad.default, args
    if func in (torch.quantile, Tensor.quantile, torch.nanquantile, Tensor.nanquantile):
        return _quantile(func.__name__, *args, **kwargs)
    if func is torch._C._nn.pad_sequence and not kwargs:
        return aten.pad_sequence.default, args
    if func in _CHANNEL_DROPOUTS:
        return _CHANNEL_DROPOUTS[func], tuple(args)
    sections = kwargs.get("indices_or_sections", kwargs.get("sections", args[1] if len(args) > 1 else None))
    if func in (torch.tensor_split, Tensor.tensor_split) and isinstance(sections, int):
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        return aten.tensor_split.sections, (args[0], int.__int__(sections), int.__int__(dim))
    return None


def _quantile(
    name: str, x: Tensor, q: Any, dim: int | None = None, keepdim: bool = False, **options: Any
) -> tuple[OpOverload, tuple[Any, ...]] | None:
    plain = isinstance(q, float) and dim is not None and not options
    return (getattr(aten, name).scalar, (x, q, dim, keepdim)) if plain else None


def _traced_sizes(tensor: Tensor, sizes: Any, *args: Any, **kwargs: Any) -> Any:
    """Return ``sizes``, the result of ``tensor.shape``, ``.size()`` or ``.size(dim)``, as traced ints."""
    if isinstance(sizes, int):
        dim = int(args[0] if args else kwargs["dim"]) % tensor.dim()
        return TracedInt(sizes, TensorSize(tensor, dim, sizes))
    return torch.Size([TracedInt(size, TensorSize(tensor, dim, size)) for dim, size in enumerate(sizes)])


def _refuse_misfit(source: Tensor, weight: Tensor) -> None:
    """Raise RuntimeError, as torch does on values alone, if a transposed convolution reads other channels."""
    given, needed = source.shape[1 - weight.dim()], weight.shape[0]
    if given != needed:
        raise RuntimeError(f"a transposed convolution reads {needed} channels, and its input has {given}")


class OperatorMode(TorchDispatchMode):
    """Record every ATen operator that has a tensor among its arguments or results.

    Args:
        python: the mode that has the running Python-level call.
        modules: the stack of running modules.
        kind: the kind of tensors that the forward runs on.
    """

    def __init__(self, python: PythonCallMode, modules: ModuleStack, kind: TensorKind) -> None:
        super().__init__()
        self.python, self.modules, self.kind = python, modules, kind
        self.calls = modules.operators
        self.paused = False
        self.num_random = 0  # operators that drew random numbers
        # id of a real tensor -> the tensor, which keeps its id in use, and its copy without data
        self._meta_copies: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard that torch would wrap around the next method costs as much as the method

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.convolution.default and args[6]:
            _refuse_misfit(*args[:2])
        out = self._run_on_meta(func, args, kwargs) if self.kind == "meta" else func(*args, **kwargs)
        if self.kind == "real" and torch.Tag.nondeterministic_seeded in func.tags:
            # A dropout draws fewer numbers after a cut; layers that are skipped at random must be the same ones.
            self.num_random += 1
            for generator in torch_generators():
                generator.manual_seed(self.num_random)
        # prim.device and the like return no tensor
        if func.namespace != "prim" and not self.paused and not self._is_reserve(func):
            self._append(func, args, kwargs, out)
        return out

    def _is_reserve(self, func: OpOverload) -> bool:
        """Whether batch norm asks for memory that only cuDNN uses: a direct call of it does not."""
        call = self.python.current
        return func is aten.empty.memory_format and call is not None and call.function is torch.batch_norm

    def runs_attention(self, query: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Whether fused attention is recorded as one operator, and not as torch runs it on the device.

        On the meta device torch would decompose it, and a GPU has several operators for it, of which none can be
        checked on the CPU.
        """
        return self.kind == "meta" or query.is_cuda

    def run_attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Record fused attention as one operator."""
        if self.kind != "meta":
            return self.run_composite(
                aten.scaled_dot_product_attention.default, (query, key, value, *args), kwargs
            )
        with _disable_current_modes():
            out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device="meta")
        self._append(aten.scaled_dot_product_attention.default, (query, key, value, *args), kwargs, out)
        return out

    def run_direct(self, direct: Callable[..., Any], call: PythonCall) -> Any:
        """Record a Python-level call whose operator ``direct`` gives; ``NotImplemented`` if torch must run it."""
        if self.kind != "meta" or self.paused or not is_undisturbed():
            return NotImplemented
        with torch._C._DisableTorchDispatch():
            try:
                covered = direct(*call.args, **call.kwargs)
            except TypeError:  # arguments by other names: torch knows them, or raises
                return NotImplemented
            if covered is None:
                return NotImplemented
            op, args = covered
            out = infer(op, tuple(self._to_meta(value) for value in args), {})
            if out is NotImplemented:
                return NotImplemented
            self._append(op, args, {}, out)
        return out[0] if isinstance(out, tuple) else out

    def run_composite(
        self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run and record ``op`` as one operator, without the operators that torch decomposes it into."""
        self.paused = True
        try:
            out = op(*args, **(kwargs or {}))
        finally:
            self.paused = False
        self._append(op, args, kwargs or {}, out)
        return out

    def _append(self, op: OpOverload, args: Any, kwargs: Any, out: Any) -> None:
        # TorchScript calls operators without a Python-level call: their sizes are constants of its code.
        if self.python.current is None:
            self.python.reads.unclear = True
        python = self.python.current or PythonCall(op.overloadpacket, args, kwargs)
        self.calls.append(OperatorCall(op, args, kwargs, out, self.modules.innermost, python, _line()))

    def _run_on_meta(self, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        meta_args = tuple(self._to_meta(value) for value in args)
        meta_kwargs = {name: self._to_meta(value) for name, value in kwargs.items()}
        out = infer(op, meta_args, meta_kwargs)
        return op(*meta_args, **meta_kwargs) if out is NotImplemented else out

    def _to_meta(self, argument: Any) -> Any:
        """Return the argument, a plain value or a list, with every tensor on the meta device."""
        if isinstance(argument, Tensor):
            return self._meta_copy(argument)
        return [self._to_meta(item) for item in argument] if isinstance(argument, (list, tuple)) else argument

    def _meta_copy(self, tensor: Tensor) -> Tensor:
        """Return the meta tensor that stands for a parameter, a buffer or another real tensor."""
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._meta_copies:
            copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._meta_copies[id(tensor)] = tensor, copy
        return self._meta_copies[id(tensor)][1]
