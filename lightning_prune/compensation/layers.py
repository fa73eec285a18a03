"""The layers of a network that can be repaired, their weights as matrices, and the filters that a cut leaves them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.utils.modules import stored_tensor

__all__ = ["Kept", "Layer", "find_layers", "kept_filters", "num_kept_inputs"]

#: Tensor -> dimension -> indices that survive, as in :class:`~lightning_prune.PruningRecord`.
Kept = Mapping[str, Mapping[int, list[int]]]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_KINDS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = {kind.forward for kind in (*_KINDS, *_TRANSPOSED_KINDS)}


@dataclass(frozen=True)
class Layer:
    """A linear map within a network: a convolution, a linear layer or a projection of an attention.

    Attributes:
        name: qualified name of the module; projections of the inputs of ``nn.MultiheadAttention`` add their letter.
        module: the module that computes it.
        weight: its weight, or the stacked weights of several projections.
        bias: in the same way.
        part: which third of ``weight`` and ``bias`` it is, if these are stacked; else None.
        bias_part: in the same way, where only the biases are stacked.
        weight_name: name of ``weight`` in the network, the first one if it has several.
        bias_name: in the same way.
    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    weight_name: str
    bias_name: str | None
    part: int | None = None
    bias_part: int | None = None

    @property
    def key(self) -> tuple[str, int | None]:
        """Key that is equal for layers with the same weight."""
        return self.weight_name, self.part

    @property
    def bias_key(self) -> str | None:
        """Key that is equal for layers with the same bias; None without bias."""
        return None if self.bias_name is None else f"{self.bias_name} {self.bias_part}"

    @property
    def is_linear(self) -> bool:
        """Whether channels are the last dimension of its outputs, instead of the second one."""
        return not isinstance(self.module, _ConvNd)

    @property
    def groups(self) -> int:
        """Number of groups of inputs; filters of a group read only its inputs."""
        return self.module.groups if isinstance(self.module, _ConvNd) else 1

    @property
    def form(self) -> tuple[type, int]:
        """Type and groups; layers with the same weight can be fitted together only if these are equal."""
        return (type(self.module) if isinstance(self.module, _ConvNd) else nn.Linear), self.groups

    def weight_data(self) -> Tensor:
        """Return the weight's data; writing to it changes the layer."""
        return _third(self.weight.data, self.part)

    def bias_data(self) -> Tensor | None:
        """Return the bias' data; writing to it changes the layer."""
        return None if self.bias is None else _third(self.bias.data, self.bias_part)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as matrices (groups, inputs of a group x taps, filters of a group)."""
        if self.is_linear:
            return weight.T[None]
        if isinstance(self.module, _ConvTransposeNd):
            taps = weight.view(self.groups, -1, weight.shape[1], math.prod(weight.shape[2:]))
            return taps.transpose(2, 3).flatten(1, 2)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1).transpose(1, 2)

    def weight_of(self, matrix: Tensor) -> Tensor:
        """Return the weight that :meth:`matrix` gives as ``matrix``."""
        shape = self.weight_data().shape
        if self.is_linear:
            return matrix[0].T
        if isinstance(self.module, _ConvTransposeNd):
            inputs = shape[0] // self.groups
            return matrix.view(self.groups, inputs, -1, shape[1]).transpose(2, 3).reshape(shape)
        return matrix.transpose(1, 2).reshape(shape)

    def in_groups(self, rows: Tensor) -> Tensor:
        """Return rows of outputs (positions, filters) as (groups, positions, filters of a group)."""
        return rows.view(len(rows), self.groups, -1).transpose(0, 1)


def _third(data: Tensor, part: int | None) -> Tensor:
    size = len(data) // 3
    return data if part is None else data[part * size : (part + 1) * size]


def find_layers(model: nn.Module) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers that can be repaired, and why others are left alone, by name.

    Frozen parameters stay as they are, unless all of the network is frozen, as networks for inference are.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    candidates = [layer for name, module in model.named_modules() for layer in _layers(name, module, names)]
    respects_freeze = any(parameter.requires_grad for parameter in model.parameters())
    readers = _readers(model)
    reasons = {
        layer.name: _obstacle(layer, candidates, readers, respects_freeze)
        or _overridden(layer.module, _FORWARDS | {nn.MultiheadAttention.forward})
        for layer in candidates
    }
    obstructed = {layer.key for layer in candidates if reasons[layer.name]}
    left_alone = {
        layer.name: reasons[layer.name] or "it shares the weight of a layer that is left alone"
        for layer in candidates
        if layer.key in obstructed
    }
    left_alone.update(_parametrised(model))
    return [layer for layer in candidates if layer.name not in left_alone], left_alone


def _layers(name: str, module: nn.Module, names: Mapping[int, str]) -> Iterator[Layer]:
    """Yield the layers that a module itself computes."""
    if isinstance(module, nn.MultiheadAttention):
        yield from _projections(name, module, names)
    elif isinstance(module, (*_KINDS, *_TRANSPOSED_KINDS)) and id(module._parameters.get("weight")) in names:
        yield _layer(name, module, module.get_parameter("weight"), stored_tensor(module, "bias"), names)


def _layer(
    name: str,
    module: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    names: Mapping[int, str],
    part: int | None = None,
    bias_part: int | None = None,
) -> Layer:
    return Layer(name, module, weight, bias, names[id(weight)], names.get(id(bias)), part, bias_part)


def _projections(name: str, module: nn.MultiheadAttention, names: Mapping[int, str]) -> Iterator[Layer]:
    """Yield the projections of queries, keys and values; that of the outputs is a module of its own."""
    if stored_tensor(module.out_proj, "weight") is None:
        return
    bias = stored_tensor(module, "in_proj_bias")
    for part, letter in enumerate("qkv"):
        weight = stored_tensor(module, f"{letter}_proj_weight")
        matrix = stored_tensor(module, "in_proj_weight") if weight is None else weight
        if matrix is not None and id(matrix) in names:
            stacked = part if weight is None else None
            yield _layer(f"{name}.{letter}", module, matrix, bias, names, stacked, part)


def _readers(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of the modules that have each parameter, by its identity."""
    readers: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                readers.setdefault(id(parameter), []).append(name)
    return readers


def _obstacle(
    layer: Layer, candidates: list[Layer], readers: Mapping[int, list[str]], respects_freeze: bool
) -> str | None:
    """Return the reason why the weight of a layer must not be changed; None if it may."""
    if not layer.weight.is_floating_point():
        return f"its weight is of type {layer.weight.dtype}"
    if not layer.weight.numel():
        return "nothing is left of it"
    if respects_freeze and not layer.weight.requires_grad:
        return "frozen"
    modules = {id(each.module) for each in candidates if each.weight is layer.weight}
    if len(modules) < len(readers[id(layer.weight)]):
        return "a module of another kind reads its weight"
    if any(each.form != layer.form for each in candidates if each.key == layer.key):
        return "another layer reads its weight in another form"
    others = [each for each in candidates if each.bias is layer.bias and each.weight is not layer.weight]
    if layer.bias_name is not None and any(each.module is not layer.module for each in others):
        return "a layer with another weight has the same bias"
    return None


def _overridden(module: nn.Module, known: set[object]) -> str | None:
    """Return the reason if a module overrides its forward, which may not be linear then; else None."""
    overridden = "forward" in vars(module) or type(module).forward not in known
    return "it has a forward of its own" if overridden else None


def _parametrised(model: nn.Module) -> dict[str, str]:
    """Return the layers whose weight is computed from others, as by ``spectral_norm``."""
    kinds = (*_KINDS, *_TRANSPOSED_KINDS)
    return {
        name: "its weight or bias is computed"
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and (module._parameters.get("weight") is None or "bias" not in module._parameters)
    }


def kept_filters(layer: Layer, kept: Kept) -> Tensor | None:
    """Return the indices of the filters of a dense layer that survive the cut; None: all."""
    dims = kept.get(layer.weight_name, {})
    if layer.part is not None:
        size = len(layer.weight_data())
        survivors = (
            torch.tensor(dims.get(0, range(3 * size)), dtype=torch.int64, device="cpu") - layer.part * size
        )
        return survivors[(survivors >= 0) & (survivors < size)] if 0 in dims else None
    if not isinstance(layer.module, _ConvTransposeNd):
        return torch.tensor(dims[0], dtype=torch.int64, device="cpu") if 0 in dims else None
    return _kept_filters_of_transposed(layer, dims)


def _kept_filters_of_transposed(layer: Layer, dims: Mapping[int, list[int]]) -> Tensor | None:
    """The weight is (inputs, filters of a group, ...): a group survives if one of its inputs does."""
    if not dims:
        return None
    inputs, filters = layer.weight.shape[0] // layer.groups, layer.weight.shape[1]
    within = torch.tensor(dims.get(1, range(filters)), dtype=torch.int64, device="cpu")
    survivors = torch.tensor(dims.get(0, range(layer.weight.shape[0])), dtype=torch.int64, device="cpu")
    groups = (survivors // inputs).unique()
    return (groups[:, None] * filters + within).flatten()


def num_kept_inputs(layer: Layer, kept: Kept) -> int:
    """Return the number of inputs x taps that each filter of a dense layer has after the cut, at most."""
    transposed = isinstance(layer.module, _ConvTransposeNd)
    dim, shape = (0 if transposed else 1), layer.weight_data().shape
    survivors = kept.get(layer.weight_name, {}).get(dim)
    inputs = shape[dim] if survivors is None else len(survivors)
    taps = math.prod(shape[2:])
    return max(1, inputs // (layer.groups if transposed else 1)) * taps
