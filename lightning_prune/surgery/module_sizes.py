"""The sizes that the printed model shows. No operator reads them, or the trace would have set them (level 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

__all__ = ["show_sizes_", "shown_sizes"]

#: attribute -> the tensor whose size it is, and the dimension
SHOWN: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.modules.conv._ConvNd: {"out_channels": ("weight", 0), "in_channels": ("weight", 1)},
    nn.modules.conv._ConvTransposeNd: {"in_channels": ("weight", 0), "out_channels": ("weight", 1)},
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.MultiheadAttention: dict.fromkeys(("embed_dim", "kdim", "vdim"), ("in_proj_weight", 1)),
    nn.RNNBase: {"input_size": ("weight_ih_l0", 1)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
}


def shown_sizes(module: nn.Module) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    """What the attributes of ``module`` should say, by its tensors as they are now."""
    kind = next((kind for kind in reversed(SHOWN) if isinstance(module, kind)), None)
    for attribute, (name, dim) in SHOWN[kind].items() if kind else ():
        tensor = getattr(module, name, None)
        tensor = getattr(module, "running_mean", None) if tensor is None else tensor
        if isinstance(tensor, Tensor):
            grouped = isinstance(module, nn.modules.conv._ConvNd) and dim == 1
            yield attribute, tensor.shape[dim] * (int(module.groups) if grouped else 1)  # type: ignore[arg-type]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
        yield "normalized_shape", tuple(module.weight.shape)


def show_sizes_(model: nn.Module, names: Iterable[str]) -> dict[str, int | tuple[int, ...]]:
    """Set these attributes of the modules that hold the tensors ``names``; path of each -> its value."""
    found: dict[str, int | tuple[int, ...]] = {}
    for name in sorted({name.rpartition(".")[0] for name in names}):
        module = model.get_submodule(name)
        for attribute, size in shown_sizes(module):
            setattr(module, attribute, size)
            found[f"{name}.{attribute}".lstrip(".")] = size
    return found
