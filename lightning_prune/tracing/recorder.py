"""Run a network's forward without data and record every operator.

Meta and fake tensors have shapes but no data, so a recording costs no arithmetic and no memory. Meta tensors are
several times faster and are tried first. Fake tensors, which also report a device, are tried where a network does
not run on meta tensors; real tensors are used where the forward needs values.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lightning_prune.tracing.calls import Recording, tensors_in
from lightning_prune.tracing.isolation import restored
from lightning_prune.tracing.mode_reads import mode_reads
from lightning_prune.tracing.modes import ModuleStack, OperatorMode, PythonCallMode, TensorKind
from lightning_prune.tracing.size_caches import caches_bypassed
from lightning_prune.tracing.size_reads import attribute_reads
from lightning_prune.tracing.traced_int import record_size_events, trace_attributes
from lightning_prune.utils.devices import on_default_device
from lightning_prune.utils.passing import is_passing
from lightning_prune.utils.train_modes import mode_is_only_a_flag, switch_modes_

__all__ = ["patched_torch", "raised_in", "record_forward"]

# Errors of fake tensors for which the forward is run on real tensors: a branch on a value, a shape that depends on
# values, an operator without a shape function, numpy.
_VALUE_ERRORS = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
_VALUE_ERROR_TEXTS = ("no fake impl registered", "not supported for tensor subclasses", "access data pointer")
_FOLLOWED = "the branches that the example input takes were followed"
NEEDS_VALUES = f"needs values to run; {_FOLLOWED}"
_NOTE_PREFIX = "raised in module "  # begins the note that is added to an exception of the forward
_FAKE_TENSOR_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")


@dataclass(frozen=True)
class _Forward:
    """A forward of a model on example inputs, in train or eval mode."""

    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    training: bool

    def record(self, kind: TensorKind) -> Recording:
        """Record the forward on tensors of ``kind``, and restore the model except the values of its buffers."""
        with restored(self.model), patched_torch(), caches_bypassed(self.model):
            switch_modes_(self.model, self.training)
            trace_attributes(self.model)
            return self._run(kind)

    def record_on_values(self) -> Recording:
        """Record the forward on a copy of the real inputs, and restore the model."""
        buffers = [(buffer, buffer.detach().clone()) for buffer in self.model.buffers()]
        try:
            return self.record("real")
        finally:
            for buffer, value in buffers:
                buffer.data.copy_(value)

    def _run(self, kind: TensorKind) -> Recording:
        fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        inputs, kwargs = _convert(kind, fake_mode, (self.inputs, dict(self.kwargs)))
        outer_mode = fake_mode if kind == "fake" else contextlib.nullcontext()
        modules, python = ModuleStack(self.model), PythonCallMode()
        operators = python.operators = OperatorMode(python, modules, kind)
        try:
            with (
                record_size_events() as events,
                torch.no_grad(),
                on_default_device(),
                outer_mode,
                modules.hooked(),
                mode_reads() as reads,
                attribute_reads(python.reads),
                python,
                operators,
            ):
                out = self.model(*inputs, **kwargs)
        except Exception as error:
            error.add_note(f"{_NOTE_PREFIX}{modules.failed_module or ''}")
            raise
        python.reads.ends = tensors_in((inputs, kwargs)), tensors_in(out)
        return Recording(
            calls=operators.calls,
            outputs=tensors_in(out),
            training=self.training,
            real=kind == "real",
            size_events=events,
            numpy_tensors=python.numpy_tensors,
            entered=modules.entered,
            module_calls=modules.calls,
            reads=python.reads,
            modes_alike=not (self.training or kind == "real" or reads.unknown)
            and mode_is_only_a_flag(self.model),
        )


def record_forward(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool
) -> Recording:
    """Record one forward of ``model`` in eval or train mode, and restore the model's state.

    Where the forward needs values (a branch on a tensor), or an operator has no shape function for its arguments, it
    is run on a copy of the real inputs, and the branches that they take are recorded.

    Raises:
        Exception: the forward's own exception, with a note that names the module (see :func:`raised_in`). A lack of
            memory and the like is raised too: it is no reason to run the forward on other tensors.
    """
    forward = _Forward(model, inputs, kwargs, training)
    with contextlib.suppress(Exception):  # fake tensors show if the error is the model's own
        return forward.record("meta")
    try:
        return forward.record("fake")
    except Exception as error:
        if is_passing(error):
            raise
        reason = NEEDS_VALUES if _needs_values(error) else f"{_refusal(error)}; {_FOLLOWED}"
    # Only real tensors show whether an operator refuses its arguments, or only its shape function does.
    return dataclasses.replace(forward.record_on_values(), reason=reason)


def _refusal(error: Exception) -> str:
    first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"an operator runs on real tensors only ({first_line})"


def raised_in(error: BaseException) -> str:
    """Return the name of the innermost module whose forward raised ``error``; "" if it is not known."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_NOTE_PREFIX)]
    return notes[0].removeprefix(_NOTE_PREFIX) if notes else ""


def _convert(kind: TensorKind, fake_mode: FakeTensorMode, inputs: Any) -> Any:
    """Return the example inputs with all their tensors of the given kind; real ones, and objects, are copied."""

    def converted(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            # A forward may write into objects, such as a cache of keys and values.
            return leaf if isinstance(leaf, nn.Module) else copy.deepcopy(leaf)
        return torch.empty_like(leaf, device="meta") if kind == "meta" else fake_mode.from_tensor(leaf)

    return copy.deepcopy(inputs) if kind == "real" else tree_map(converted, inputs)


def _needs_values(error: Exception) -> bool:
    """Whether fake tensors raised ``error`` because they have no values."""
    return isinstance(error, _VALUE_ERRORS) or any(text in str(error) for text in _VALUE_ERROR_TEXTS)


@contextlib.contextmanager
def patched_torch() -> Iterator[None]:
    """Make torch show all operators to the modes within the block, and log no errors that are handled here.

    ``nn.MultiheadAttention`` has a fast path of one opaque operator; it is disabled. So is cuDNN, whose norms and
    recurrent layers are operators that nothing can repeat on the CPU.
    """
    fast_path, disabled = torch.backends.mha.get_fastpath_enabled(), _FAKE_TENSOR_LOGGER.disabled
    cudnn = torch._C._get_cudnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_cudnn_enabled(False)
    _FAKE_TENSOR_LOGGER.disabled = True
    replacements = _functional_replacements()
    originals = {name: getattr(F, name) for name in replacements}
    vars(F).update(replacements)
    try:
        yield
    finally:
        vars(F).update(originals)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch._C._set_cudnn_enabled(cudnn)
        _FAKE_TENSOR_LOGGER.disabled = disabled


def _functional_replacements() -> dict[str, Callable[..., Any]]:
    """Return replacements for functions of ``torch.nn.functional``, by name.

    Under a function mode, a Python function of that module passes itself to the mode as one call, which hides the
    calls inside it; its check for overrides (``has_torch_function``) is therefore made to return False. Norms raise
    in train mode on a single value per channel, which is enough without data; these checks are made to pass.
    """
    overrides = [name for name in vars(F) if name.startswith("has_torch_function")]
    return {
        **dict.fromkeys(overrides, lambda *args: False),
        "_verify_batch_size": lambda size: None,
        "_verify_spatial_size": lambda size: None,
    }
