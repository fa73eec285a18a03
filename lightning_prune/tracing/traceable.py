"""What can be traced, what must be taken out of its wrapper first, and what stays whole (level 0)."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["kept_whole", "refusal", "unwrapped"]

_ANEW = "remembers the shapes of its parameters: trace and prune its .module, then wrap that again"
_SHARDED = "holds its parameters in shards: prune the network before it is sharded"
_WRAPPERS = {
    "DistributedDataParallel": _ANEW,
    "FullyShardedDataParallel": _SHARDED,
    "FSDPModule": _SHARDED,
}


def refusal(model: nn.Module) -> str | None:
    """Why ``model`` cannot be traced as it is, and what to do instead; None if it can be tried.

    Example:
        >>> refusal(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyBatchNorm2d()))
        "'1' (LazyBatchNorm2d) has no shape yet: run the network once, so that it gets its parameters"
        >>> refusal(nn.Conv2d(3, 8, 3)) is None
        True
    """
    if not isinstance(model, nn.Module):
        return f"can trace an nn.Module, not a {type(model).__name__}"
    if isinstance(model, torch.jit.ScriptModule):
        return "the network is scripted: trace and prune the one that it was made from, then script that"
    for name, module in model.named_modules():
        if (why := _why_not(module)) is not None:
            return f"{repr(name) if name else 'the network'} ({type(module).__name__}) {why}"
    return None


def _why_not(module: nn.Module) -> str | None:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    bases = {base.__name__ for base in type(module).__mro__}
    if (wrapper := next((name for name in _WRAPPERS if name in bases), None)) is not None:
        return _WRAPPERS[wrapper]
    if any(is_lazy(tensor) for tensor in own):
        return "has no shape yet: run the network once, so that it gets its parameters"
    if _quantised(module, own):
        return "is quantised: prune the float network, then quantise the smaller one"
    if any(is_traceable_wrapper_subclass(tensor) for tensor in own):
        return "has parameters of a tensor type of its own: prune the network before they are converted"
    if isinstance(module, torch.fx.GraphModule) and "train" in vars(module):  # its train() raises
        return "is an exported program: trace and prune the network that it was made from, then export that"
    return None


def _quantised(module: nn.Module, own: list[Tensor]) -> bool:
    path = type(module).__module__.split(".")
    return (path[0] == "torch" and "quantized" in path) or any(tensor.is_quantized for tensor in own)


def kept_whole(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Parameters and buffers that cannot be cut, or not be proven, with the reason."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.layout is not torch.strided:
            yield tensor, "belongs to a sparse tensor"
        elif tensor.is_complex():
            yield tensor, "belongs to a tensor of complex numbers"
    for module in model.modules():
        if isinstance(module, nn.LSTM) and module.proj_size:
            for name, tensor in module.named_parameters():
                if name.startswith("bias_ih"):
                    yield tensor, "is the state of an LSTM, which torch wants wider than its projection"


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Within the block compiled code runs as it was written, and ``nn.DataParallel`` runs the module that it wraps.

    The wrappers stay in the model, so names are those of its own ``state_dict``.
    """
    parallel = [module for module in model.modules() if isinstance(module, nn.DataParallel)]
    for module in parallel:
        vars(module)["forward"] = module.module
    try:
        with _eager():
            yield
    finally:
        for module in parallel:
            vars(module).pop("forward", None)


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    compiled = "torch._dynamo" in sys.modules  # else nothing can have been compiled
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with stance, _without_onednn(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*global hooks on modules")  # ours, on a compiled module
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # in a checkpoint
        yield


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Its recurrent layers are one opaque operator. (``torch.backends.mkldnn.flags`` touches TF32, and warns.)"""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
