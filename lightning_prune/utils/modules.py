"""NEW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by qualified name, shared ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def cut(tensor: Tensor, dims: Mapping[int, list[int]]) -> Tensor:
    """A new tensor with only the given indices of each dimension, in the same memory format."""
    data = tensor.detach()
    for dim, indices in dims.items():
        data = data.index_select(dim, torch.as_tensor(indices, dtype=torch.int64, device=data.device))
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not tensor.is_contiguous():
        return data.contiguous(memory_format=torch.channels_last)
    return data.contiguous()


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Put other data into the same tensor object; everybody's references stay valid.

    As long as somebody holds a loss of before, autograd keeps the node that accumulates the gradient, which knows
    the old shape. It is made anew when the type changes, so the type changes for a moment.
    """
    other = torch.float32 if data.dtype == torch.float16 else torch.float16
    tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
    tensor.grad = None


def freeze_empty_(tensors: Iterable[Tensor]) -> None:
    """What has no elements left is not trained: nobody uses it, which DistributedDataParallel would not bear."""
    for tensor in tensors:
        if not tensor.numel() and tensor.requires_grad:
            tensor.requires_grad_(False)


@contextmanager
def switched(model: nn.Module, training: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Every module in train or eval mode as ``training`` says, and as it was afterwards."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = training(module)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
