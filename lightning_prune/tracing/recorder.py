"""Run a network's forward without data and write down every operator (level 1).

Meta and fake tensors have shapes but no data, so a recording costs no arithmetic and no memory. Meta tensors are
several times quicker; where a network does not run on them, fake tensors, which keep up appearances (a device,
say), are tried, and where values are needed, the real ones.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
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
from torch.utils._pytree import tree_map_only

from lightning_prune.tracing.calls import Recording, tensors_in
from lightning_prune.tracing.isolation import untouched
from lightning_prune.tracing.modes import Means, ModuleStack, Operators, PythonCalls
from lightning_prune.tracing.traced_int import listening, trace_attributes

__all__ = ["raised_in", "record"]

# What fake tensors cannot answer: a branch on a value, a shape that depends on values, an operator without
# a shape function. Then the network is run for real.
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
NEEDS_DATA = ("no fake impl registered", "not supported for tensor subclasses", "access data pointer")
RAISED_IN = "raised in module "  # the note that an exception of the forward gets
_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")


def raised_in(error: BaseException) -> str:
    """Name of the innermost module whose forward raised ``error``."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(RAISED_IN)]
    return notes[0].removeprefix(RAISED_IN) if notes else ""


def _prepared(means: Means, mode: FakeTensorMode, value: Any) -> Any:
    """The example input as the chosen means want it."""
    if means == "meta":
        return tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), value)
    return tree_map_only(Tensor, mode.from_tensor, value) if means == "fake" else copy.deepcopy(value)


def _run(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool, means: Means
) -> Recording:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    where, python = ModuleStack(model), PythonCalls()
    operators = python.operators = Operators(python, where, means)
    inputs, kwargs = _prepared(means, fake, (inputs, dict(kwargs)))
    model.train(not training)  # networks that cache what they compute in eval mode drop it on a change
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
