"""Failures that may pass, such as a lack of memory: they say nothing about a network or a cut."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from lightning_prune.utils.distributed import gather_all

__all__ = ["PassingFailure", "free_memory", "is_passing", "on_all"]

T = TypeVar("T")

_TYPES = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError, TimeoutError, ConnectionError)
_ERRNOS = {errno.EINTR, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
#: Texts of errors that torch raises as plain RuntimeErrors.
_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "cuda error",
    "cuda driver error",
    "cudnn error",
    "cudnn_status",
    "cublas_status",
    "cusolver error",
    "cufft error",
    "hip error",
    "nccl error",
    "interrupted system call",
)


class PassingFailure(RuntimeError):
    """A trace or a cut failed for a reason that may pass, such as a lack of memory. Nothing was changed.

    It is no verdict: the same call may succeed later.

    Example:
        >>> is_passing(PassingFailure("CUDA out of memory; the cut was rolled back"))
        True
    """


def is_passing(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, may pass by itself.

    Such are a lack of memory, errors of a GPU and its libraries, interrupted waits, timeouts, and lost connections.

    Example:
        >>> is_passing(torch.OutOfMemoryError()), is_passing(RuntimeError("CUDA error: launch failed"))
        (True, True)
        >>> is_passing(RuntimeError("shape '[1, 8]' is invalid for input of size 6"))
        False
    """
    return any(_passes(cause) for cause in _causes(error))


def _passes(error: BaseException) -> bool:
    if isinstance(error, (*_TYPES, PassingFailure)) or getattr(error, "errno", None) in _ERRNOS:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(each in text for each in _TEXTS)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it, from the last to the first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def free_memory() -> None:
    """Collect garbage, and return the unused memory that torch holds on GPUs."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def on_all(compute: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
    """Run ``compute`` in every process; if it fails in passing in one, try once more after memory was freed.

    All processes of a distributed run must call this; either all of them return, or all raise.

    Args:
        compute: what to do; it may raise any other error.
        undo: takes back what ``compute`` changed, where it succeeded but failed in another process.

    Raises:
        PassingFailure: it failed in passing twice.

    Example:
        >>> on_all(lambda: 3)
        3
    """
    for _ in range(2):
        failures, error = [], None
        try:
            value = compute()
        except Exception as raised:
            if not is_passing(raised):
                raise
            error = raised
        failures = list(filter(None, gather_all(_describe(error) if error else "")))
        if not failures:
            return value
        undo()
        message = failures[0]
        cause, error = error, None  # the traceback holds tensors of the failed attempt
        if cause is not None:
            cause.__traceback__ = None
        free_memory()
    raise PassingFailure(message) from cause


def _describe(error: Exception) -> str:
    first = list(_causes(error))[-1]
    passing = next((each for each in _causes(error) if _passes(each)), first)
    return f"{type(passing).__name__}: {passing}".partition("\n")[0]
