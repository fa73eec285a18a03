"""Observe the calls of layers during a forward, also of the projections within ``nn.MultiheadAttention``."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_prune.compensation.layers import Layer

__all__ = ["LayerCall", "ObserveCall", "observed_calls"]


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer.

    Attributes:
        layer: that was called.
        read: returns its input.
        output: of the call.
        rerun: returns the output anew, with the present weights.
        inputs: what the module got.
    """

    layer: Layer
    read: Callable[[], Tensor]
    output: Tensor
    rerun: Callable[[], Tensor]
    inputs: Sequence[Any]

    def watch_inputs(self) -> Callable[[], bool]:
        """Return a function that tells whether the inputs are unchanged; it keeps no reference to them."""
        versions = [(weakref.ref(x), x._version) for x in self.inputs if isinstance(x, Tensor)]

        def are_unchanged() -> bool:
            present = [(x(), version) for x, version in versions]
            return all(x is None or x._version == version for x, version in present)

        return are_unchanged


#: Returns whether it changed the layer, so that the output has to be computed again.
ObserveCall = Callable[[LayerCall], bool]

_ATTENTION_ARGUMENTS = inspect.signature(nn.MultiheadAttention.forward)


@contextmanager
def observed_calls(model: nn.Module, layers: Sequence[Layer], observe: ObserveCall) -> Iterator[None]:
    """Call ``observe`` after each call of ``layers``, and compute the output again if it changed the layer.

    Linear layers that a network does not call, but whose parameters it gives to ``F.linear``, are observed too.
    """
    by_module: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        by_module.setdefault(layer.module, []).append(layer)
    linear = _LinearCalls(layers, observe)
    with ExitStack() as hooks:
        for module in model.modules():
            for handle in _hooks(module, by_module, observe, linear):
                hooks.callback(handle.remove)
        hooks.enter_context(linear)
        yield


class _LinearCalls(TorchFunctionMode):
    """Observe calls of ``F.linear`` outside of the layers' own forwards."""

    def __init__(self, layers: Sequence[Layer], observe: ObserveCall) -> None:
        super().__init__()
        self.layers = {(id(x.weight), id(x.bias)): x for x in layers if isinstance(x.module, nn.Linear)}
        self.observe = observe
        self.running: nn.Module | None = None

    def start(self, module: nn.Module, args: Any) -> None:
        """Ignore calls until the forward of a module ends."""
        self.running = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not F.linear or self.running is not None:
            return output
        x, weight, bias = _linear_arguments(*args, **(kwargs or {}))
        layer = self.layers.get((id(weight), id(bias)))
        rerun = partial(F.linear, x, weight, bias)
        return rerun() if layer and self.observe(LayerCall(layer, lambda: x, output, rerun, (x,))) else output


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _hooks(
    module: nn.Module, layers: dict[nn.Module, list[Layer]], observe: ObserveCall, linear: _LinearCalls
) -> Iterator[RemovableHandle]:
    if isinstance(module, nn.MultiheadAttention):
        inputs, output = layers.get(module, []), layers.get(module.out_proj, [])
        before = partial(_before_attention, inputs, observe)
        yield module.register_forward_pre_hook(before, with_kwargs=True)
        after = partial(_after_attention, output, observe)
        yield module.register_forward_hook(after, with_kwargs=True, prepend=True)
    elif module in layers:
        yield module.register_forward_pre_hook(linear.start)
        after = partial(_after_call, layers[module][0], observe, linear)
        yield module.register_forward_hook(after, with_kwargs=True, prepend=True)


def _after_call(
    layer: Layer,
    observe: ObserveCall,
    linear: _LinearCalls,
    module: nn.Module,
    args: Any,
    kwargs: Any,
    output: Tensor,
) -> Tensor | None:
    x = args[0] if args else kwargs["input"]
    rerun = partial(module.forward, *args, **kwargs)
    changed = rerun() if observe(LayerCall(layer, lambda: x, output, rerun, (x,))) else None
    linear.running = None
    return changed


def _before_attention(
    layers: Sequence[Layer], observe: ObserveCall, module: nn.Module, args: Any, kwargs: Any
) -> None:
    """Compute the projections of queries, keys and values, which the attention is about to compute."""
    arguments = _ATTENTION_ARGUMENTS.bind(module, *args, **kwargs).arguments
    names = {"q": "query", "k": "key", "v": "value"}
    for layer in layers:
        x = arguments[names[layer.name[-1]]]
        project = partial(_project, layer, x)
        observe(LayerCall(layer, partial(torch.as_tensor, x), project(), project, (x,)))


def _project(layer: Layer, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight_data(), layer.bias_data())


def _after_attention(
    layers: Sequence[Layer],
    observe: ObserveCall,
    module: nn.MultiheadAttention,
    args: Any,
    kwargs: Any,
    output: Any,
) -> Any:
    def rerun() -> Tensor:
        return module.forward(*args, **kwargs)[0]

    heads = partial(_heads, module, args, kwargs)
    changed = [
        observe(LayerCall(layer, heads, output[0], rerun, (*args, *kwargs.values()))) for layer in layers
    ]
    return module.forward(*args, **kwargs) if any(changed) else None


def _heads(module: nn.MultiheadAttention, args: Any, kwargs: Any) -> Tensor:
    """Return what the projection of the outputs reads, by running the attention with the identity in its place."""
    weight, bias = module.out_proj.weight, module.out_proj.bias
    before = weight.data, None if bias is None else bias.data
    try:
        weight.data = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        if bias is not None:
            bias.data = bias.new_zeros(weight.shape[1])
        return module.forward(*args, **kwargs)[0]
    finally:
        weight.data = before[0]
        if bias is not None and before[1] is not None:
            bias.data = before[1]
