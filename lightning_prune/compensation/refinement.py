"""Refine a repaired network: move all its layers together, by gradients, so that its outputs come nearer.

Layers that are fitted one by one cannot make up for each other's errors; steps on the outputs can. This is a
distillation of the dense network on the images of the repair, without labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.compensation.calibration import Calibration, outputs_of, undisturbed
from lightning_prune.compensation.im2col import ImageAxis, image_axis
from lightning_prune.compensation.layers import Layer
from lightning_prune.utils.example_inputs import batched_tensors, is_image_list

__all__ = ["Refinement", "refine_"]

_BATCH = 32  # images of a step: the activations of so many are in memory at once
_RATE = 0.01  # highest learning rate of Adam, as a share of the root mean square of a layer's weight
_BETAS = (0.9, 0.99)  # a short memory, as there are few steps
_WARM_UP = 0.1  # share of the steps in which the learning rate rises


@dataclass(frozen=True)
class Refinement:
    """The outcome of :func:`refine_`.

    Attributes:
        change: distance of the outputs from the dense ones on held-out images.
        names: of the parameters that were changed.
        reason: why nothing was changed; empty if something was.
    """

    change: float
    names: frozenset[str] = frozenset()
    reason: str = ""


def refine_(
    model: nn.Module,
    layers: Sequence[Layer],
    images: Calibration,
    dense: Sequence[Tensor],
    passes: int,
    before: float,
    measure: Callable[[], float],
) -> Refinement:
    """Take gradient steps with weights and biases of ``layers``; undo them unless the outputs came nearer.

    The loss is the squared distance of the outputs, as a share of their variance, on the images that layers are
    fitted to, in eval mode. The gradients that parameters have, and whether they require one, stay as they are.

    Args:
        model: after its repair.
        layers: that may be changed.
        images: of the repair.
        dense: outputs of the dense network on all images.
        passes: number of passes over the images.
        before: distance of the outputs from the dense ones on held-out images.
        measure: returns that distance anew.
    """
    parameters = _parameters(layers)
    restore = _snapshot(parameters.values())
    try:
        reason = _take_steps(model, parameters, _rates(layers), images, dense, passes)
        after = before if reason else measure()
    except BaseException:
        restore(True)
        raise
    accepted = after < before
    restore(not accepted)
    if accepted:
        return Refinement(after, frozenset(parameters))
    return Refinement(before, reason=reason or f"the outputs came no nearer by it (change {after:.2g})")


def _parameters(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return weights and biases by name, without biases that are frozen while their weight is not."""
    parameters: dict[str, Tensor] = {}
    for layer in layers:
        parameters[layer.weight_name] = layer.weight
        frozen = layer.bias is not None and layer.weight.requires_grad and not layer.bias.requires_grad
        if layer.bias is not None and layer.bias_name is not None and not frozen:
            parameters[layer.bias_name] = layer.bias
    return parameters


def _rates(layers: Sequence[Layer]) -> dict[str, float]:
    """Return the highest learning rate of each parameter, by name: in proportion to the weight of its layer."""
    rates: dict[str, float] = {}
    for layer in layers:
        rate = _RATE * float(layer.weight.detach().double().square().mean().sqrt())
        rates.update({str(name): rate for name in (layer.weight_name, layer.bias_name)})
    return rates


def _snapshot(parameters: Iterable[Tensor]) -> Callable[[bool], None]:
    """Return a function that restores whether parameters require gradients; called with True, their values too."""
    states = [(parameter, parameter.requires_grad, parameter.data.clone()) for parameter in parameters]

    def restore(values: bool) -> None:
        for parameter, requires_grad, value in states:
            parameter.requires_grad_(requires_grad)
            if values:
                parameter.data.copy_(value)

    return restore


def _take_steps(
    model: nn.Module,
    parameters: dict[str, Tensor],
    rates: dict[str, float],
    images: Calibration,
    dense: Sequence[Tensor],
    passes: int,
) -> str:
    """Take the steps of all passes; return why that is impossible, or nothing."""
    batches = list(_batches(images.num_fit, passes))
    optimizer = _Optimizer(parameters, rates, len(batches))
    with undisturbed(model), torch.enable_grad():
        for batch in batches:
            try:
                optimizer.step(_loss(model, images, dense, batch))
            except Exception as error:  # the network's own code may raise anything
                return f"no steps on its outputs are possible: {error}"
    return ""


def _batches(num_images: int, passes: int) -> Iterator[Tensor]:
    """Yield the numbers of the images of each step."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(passes):
        yield from torch.randperm(num_images, generator=generator, device="cpu").split(_BATCH)


class _Optimizer:
    """Adam on copies in full precision, since single steps may be too small for a weight in half precision.

    Args:
        parameters: by name.
        rates: highest learning rate of each.
        steps: number of all steps.
    """

    def __init__(self, parameters: dict[str, Tensor], rates: dict[str, float], steps: int) -> None:
        self.parameters = [parameter.requires_grad_() for parameter in parameters.values()]
        self.copies = [each.detach().to(_precise(each.dtype), copy=True) for each in self.parameters]
        groups = [{"params": [x], "lr": rates[name]} for name, x in zip(parameters, self.copies, strict=True)]
        self.adam = torch.optim.Adam(groups, betas=_BETAS)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda step: _factor(step, steps))

    def step(self, loss: Tensor) -> None:
        """Move the parameters so that the loss falls."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        for value, gradient in zip(self.copies, gradients, strict=True):
            value.grad = gradient.to(value.dtype)
        self.adam.step()
        self.schedule.step()
        for parameter, value in zip(self.parameters, self.copies, strict=True):
            parameter.data.copy_(value)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _factor(step: int, steps: int) -> float:
    """Return the share of the highest learning rate: a short rise, and half a cosine to zero."""
    return min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def _loss(model: nn.Module, images: Calibration, dense: Sequence[Tensor], batch: Tensor) -> Tensor:
    """Return the squared distance of the outputs for some images, as a share of their variance."""
    outputs = outputs_of(model, replace(images, example=_part(images, batch)))
    if len(outputs) != len(dense):
        raise ValueError("sizes of its outputs depend on values")
    axes = [image_axis(output.shape, images.num_images) for output in dense]
    distances = [
        _distance(output, target, axis, batch)
        for output, target, axis in zip(outputs, dense, axes, strict=True)
        if axis is not None
    ]
    return torch.stack(distances).mean()


def _part(images: Calibration, batch: Tensor) -> Any:
    """Return the example with some of its images."""

    def chosen(leaf: Tensor) -> Tensor:
        return leaf[batch.to(leaf.device)] if leaf.dim() else leaf

    is_list = is_image_list(images.example)
    if is_list or any(len(leaf) != images.num_images for leaf in batched_tensors(images.example)):
        raise ValueError("not every input has one entry for each image")
    return tree_map_only(Tensor, chosen, images.example)


def _distance(output: Tensor, dense: Tensor, axis: ImageAxis, batch: Tensor) -> Tensor:
    """Return the squared distance of one output from that of the dense network for all images."""
    entries = (batch[:, None] * axis.entries + torch.arange(axis.entries, device=batch.device)).flatten()
    target = dense.index_select(axis.dim, entries.to(dense.device))
    if output.shape != target.shape:
        raise ValueError(f"an output is of shape {tuple(output.shape)}, not {tuple(target.shape)}")
    dtype = _precise(output.dtype)
    variance = (dense.to(dtype) - dense.to(dtype).mean()).square().mean().clamp(min=1e-12)
    return (output.to(dtype) - target.to(dtype)).square().mean() / variance
