"""Observe the calls of layers during a forward, also of the projections within ``nn.MultiheadAttention``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.compensation.layers import Layer

__all__ = ["ObserveCall", "observed_calls"]

#: Takes the layer, a function that returns the input, and the output; returns whether it changed the layer's weights.
ObserveCall = Callable[[Layer, Callable[[], Tensor], Tensor], bool]

_ATTENTION_ARGUMENTS = inspect.signature(nn.MultiheadAttention.forward)


@contextmanager
def observed_calls(model: nn.Module, layers: Sequence[Layer], observe: ObserveCall) -> Iterator[None]:
    """Call ``observe`` after each call of ``layers``, and compute the output again if it changed the layer."""
    by_module: dict[nn.Module, list[Layer]] = {}
    for layer in layers:
        by_module.setdefault(layer.module, []).append(layer)
    with ExitStack() as hooks:
        for module in model.modules():
            for handle in _hooks(module, by_module, observe):
                hooks.callback(handle.remove)
        yield


def _hooks(
    module: nn.Module, layers: dict[nn.Module, list[Layer]], observe: ObserveCall
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    if isinstance(module, nn.MultiheadAttention):
        inputs, output = layers.get(module, []), layers.get(module.out_proj, [])
        before = partial(_before_attention, inputs, observe)
        yield module.register_forward_pre_hook(before, with_kwargs=True)
        after = partial(_after_attention, output, observe)
        yield module.register_forward_hook(after, with_kwargs=True, prepend=True)
    elif module in layers:
        after = partial(_after_call, layers[module][0], observe)
        yield module.register_forward_hook(after, with_kwargs=True, prepend=True)


def _after_call(
    layer: Layer, observe: ObserveCall, module: nn.Module, args: Any, kwargs: Any, output: Tensor
) -> Tensor | None:
    x = args[0] if args else kwargs["input"]
    return module.forward(*args, **kwargs) if observe(layer, lambda: x, output) else None


def _before_attention(
    layers: Sequence[Layer], observe: ObserveCall, module: nn.Module, args: Any, kwargs: Any
) -> None:
    """Compute the projections of queries, keys and values, which the attention is about to compute."""
    arguments = _ATTENTION_ARGUMENTS.bind(module, *args, **kwargs).arguments
    names = {"q": "query", "k": "key", "v": "value"}
    for layer in layers:
        x = arguments[names[layer.name[-1]]]
        observe(layer, lambda x=x: x, F.linear(x, layer.weight_data(), layer.bias_data()))  # type: ignore[misc]


def _after_attention(
    layers: Sequence[Layer],
    observe: ObserveCall,
    module: nn.MultiheadAttention,
    args: Any,
    kwargs: Any,
    output: Any,
) -> Any:
    changed = [observe(layer, lambda: _heads(module, args, kwargs), output[0]) for layer in layers]
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
