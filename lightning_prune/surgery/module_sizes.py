"""Size attributes of modules, such as ``out_channels``, that are shown by ``repr`` but read by no operator.

Attributes that determine a dimension in the forward are found by the trace, and set by :mod:`.prune`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from torch import Tensor, nn

from lightning_prune.utils.module_walk import named_modules

__all__ = ["current_sizes", "update_sizes_"]

#: Module type -> attribute -> the tensor whose size it is, and the dimension. Derived types come after their base.
SIZE_ATTRIBUTES: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.modules.conv._ConvNd: {"out_channels": ("weight", 0), "in_channels": ("weight", 1)},
    nn.modules.conv._ConvTransposeNd: {"in_channels": ("weight", 0), "out_channels": ("weight", 1)},
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.MultiheadAttention: dict.fromkeys(("embed_dim", "kdim", "vdim"), ("in_proj_weight", 1)),
    nn.RNNBase: {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)},
    nn.RNNCellBase: {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
}


def current_sizes(module: nn.Module) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    """Yield each size attribute of ``module``, with the value that follows from its tensors.

    Example:
        >>> list(current_sizes(nn.Linear(3, 2)))
        [('out_features', 2), ('in_features', 3)]
    """
    kind = _kind_of(type(module))  # type: ignore[arg-type]
    for attribute, (name, dim) in SIZE_ATTRIBUTES[kind].items() if kind else ():
        if attribute == "hidden_size" and isinstance(module, nn.LSTM) and module.proj_size:
            continue  # the width of the projection stands there; that of the states never changes
        if attribute not in vars(module):  # a property, say, which follows the tensors by itself
            continue
        tensor = _stored_tensor(module, name)
        tensor = _stored_tensor(module, "running_mean") if tensor is None else tensor  # norms without weight
        if tensor is not None:
            grouped = isinstance(module, nn.modules.conv._ConvNd) and dim == 1
            yield attribute, tensor.shape[dim] * (int(module.groups) if grouped else 1)  # type: ignore[arg-type]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        weight = _stored_tensor(module, "weight")
        if weight is not None:
            yield "normalized_shape", tuple(weight.shape)


@lru_cache(maxsize=1024)
def _kind_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the last class in ``SIZE_ATTRIBUTES`` that a class is derived from; None if there is none."""
    return next((base for base in reversed(SIZE_ATTRIBUTES) if issubclass(kind, base)), None)


def _stored_tensor(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter or buffer, or the tensor of its shape that it is computed from.

    Reading the attribute itself may run code: a parametrised weight is computed, and spectral norm in train mode
    changes its vectors then.
    """
    tensors = {**module._parameters, **module._buffers}
    for stored_name in (name, f"{name}_orig", f"{name}_v"):  # spectral norm and weight norm by hooks
        if tensors.get(stored_name) is not None:
            return tensors[stored_name]
    parametrizations = module._modules.get("parametrizations")
    if not isinstance(parametrizations, nn.ModuleDict) or name not in parametrizations:
        return None
    parts = parametrizations[name]
    originals = [tensor for tensor in {**parts._parameters, **parts._buffers}.values() if tensor is not None]
    return max(originals, key=Tensor.numel, default=None)  # weight norm stores magnitudes and directions


def size_paths(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the paths of the size attributes of the modules that own the tensors ``names``."""
    owners, modules = sorted({name.rpartition(".")[0] for name in names}), dict(named_modules(model))
    paths = ((owner, attribute) for owner in owners for attribute, _ in current_sizes(modules[owner]))
    return [f"{owner}.{attribute}".lstrip(".") for owner, attribute in paths]


def update_sizes_(model: nn.Module, names: Iterable[str]) -> dict[str, int | tuple[int, ...]]:
    """Set the size attributes of the modules that own the tensors ``names``; return path -> value."""
    values: dict[str, int | tuple[int, ...]] = {}
    modules = dict(named_modules(model))
    for module_name in sorted({name.rpartition(".")[0] for name in names}):
        module = modules[module_name]
        for attribute, size in current_sizes(module):
            setattr(module, attribute, size)
            values[f"{module_name}.{attribute}".lstrip(".")] = size
    return values
