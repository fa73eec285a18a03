"""Checks of a model before its trace: models that are refused, wrappers, tensors that cannot be pruned."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_prune.utils.module_walk import modules_of, named_modules, tensors_of

__all__ = ["refusal_reason", "unprunable_tensors", "unwrapped"]

_REWRAP = "stores the shapes of its parameters: trace and prune its .module, then wrap that again"
_SHARDED = "splits its parameters into shards: prune the network before it is sharded"
_WRAPPERS = {
    "DistributedDataParallel": _REWRAP,
    "FullyShardedDataParallel": _SHARDED,
    "FSDPModule": _SHARDED,
}


def refusal_reason(model: nn.Module) -> str | None:
    """Return why ``model`` cannot be traced and what to do instead; None if nothing speaks against a trace.

    Example:
        >>> refusal_reason(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d()))
        "'1' (LazyBatchNorm2d) has no shape yet: run the network once to create its parameters"
        >>> refusal_reason(nn.Conv2d(3, 8, 3)) is None
        True
    """
    if not isinstance(model, nn.Module):
        return f"can trace an nn.Module, not a {type(model).__name__}"
    if isinstance(model, torch.jit.ScriptModule):
        return "the network is scripted: trace and prune the network that was scripted, then script the smaller one"
    for name, module in named_modules(model):
        if (reason := _module_refusal_reason(module)) is not None:
            return f"{repr(name) if name else 'the network'} ({type(module).__name__}) {reason}"
    return None


def _module_refusal_reason(module: nn.Module) -> str | None:
    if (wrapper := _wrapper_of(type(module))) is not None:  # type: ignore[arg-type]
        return _WRAPPERS[wrapper]
    if not module._parameters and not module._buffers and not isinstance(module, torch.fx.GraphModule):
        tensors = []
    else:
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any(is_lazy(tensor) for tensor in tensors):
        return "has no shape yet: run the network once to create its parameters"
    if _is_quantised(module, tensors):
        return "is quantised: prune the float network, then quantise the smaller one"
    if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors):
        return (
            "has parameters of a special tensor class: prune the network before its parameters are converted"
        )
    if isinstance(module, torch.fx.GraphModule) and "train" in vars(module):  # its train() raises
        return "is an exported program: trace and prune the network that was exported, then export the smaller one"
    return None


@lru_cache(maxsize=1024)
def _wrapper_of(kind: type[nn.Module]) -> str | None:
    """Return the name of the wrapper for distributed training that a class is; None if it is none."""
    bases = {base.__name__ for base in kind.__mro__}
    return next((name for name in _WRAPPERS if name in bases), None)


def _is_quantised(module: nn.Module, tensors: list[Tensor]) -> bool:
    path = type(module).__module__.split(".")
    return (path[0] == "torch" and "quantized" in path) or any(tensor.is_quantized for tensor in tensors)


def unprunable_tensors(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Yield parameters and buffers that cannot be pruned or whose pruning cannot be proven, with the reason."""
    for tensor in tensors_of(model):
        if tensor.layout is not torch.strided:
            yield tensor, "belongs to a sparse tensor"
        elif tensor.is_complex():
            yield tensor, "belongs to a tensor of complex numbers"
    for module in modules_of(model):
        if isinstance(module, nn.LSTM) and module.proj_size:
            for name, tensor in module.named_parameters():
                if name.startswith("bias_ih"):
                    yield (
                        tensor,
                        "is the state of an LSTM, which torch requires to be wider than its projection",
                    )


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Run compiled code uncompiled, and the module inside each ``nn.DataParallel`` directly, within the block.

    Synchronised batch norms run as plain ones: they would wait for other processes, and refuse tensors that are not
    on a GPU. The wrappers stay in the model, so names remain those of its ``state_dict``.
    """
    forwards = {
        module: forward for module in modules_of(model) if (forward := _inner_forward(module)) is not None
    }
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        with _eager():
            yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def _inner_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return what runs in place of the forward of a module that deals with other devices or processes."""
    if isinstance(module, nn.DataParallel):
        return module.module
    if (
        isinstance(module, nn.SyncBatchNorm)
        and getattr(module.forward, "__func__", None) is nn.SyncBatchNorm.forward
    ):
        return partial(nn.modules.batchnorm._BatchNorm.forward, module)
    return None


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    compiled = "torch._dynamo" in sys.modules  # otherwise nothing was compiled
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with stance, _without_onednn(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*global hooks on modules")  # the trace's hooks
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # checkpointing
        yield


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Disable oneDNN, whose recurrent layers are one opaque operator.

    ``torch.backends.mkldnn.flags`` is not used: it also sets TF32, and warns.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
