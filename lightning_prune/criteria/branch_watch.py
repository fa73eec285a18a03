"""Watch, or replace, the outputs of residual branches while a network runs on real data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.graph.residual_blocks import ResidualBlocks
from lightning_prune.tracing.modes import ModuleStack
from lightning_prune.tracing.recorder import patched_torch

__all__ = ["watched_branches"]

_ADDITIONS = {
    *("add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "subtract", "__sub__", "__isub__"),
}
#: ``(name of the block, stream, branch) -> what is added instead``, or None for the branch itself
Handle = Callable[[str, Tensor, Tensor], Tensor | None]


@contextmanager
def watched_branches(blocks: ResidualBlocks, names: Iterable[str], handle: Handle) -> Iterator[None]:
    """Call ``handle`` for each addition of a branch in the forwards within the block.

    Args:
        blocks: of the network that runs.
        names: of the blocks to watch.
        handle: gets name, stream and branch, and may return what is added instead of the branch.

    Raises:
        RuntimeError: a forward added other tensors than the recorded one, so that the additions cannot be told apart.

    Example:
        >>> import torch
        >>> from lightning_prune.classification.networks.cifar_resnet import CifarResNet
        >>> from lightning_prune.graph.block_search import residual_blocks
        >>> net, image, seen = CifarResNet(depth=8, width=4), torch.rand(1, 1, 16, 16), []
        >>> blocks = residual_blocks(net, image)
        >>> with watched_branches(blocks, blocks, lambda name, stream, branch: seen.append(name)):
        ...     _ = net(image)
        >>> seen
        ['blocks.0']
    """
    stack = _Stack(blocks.model)
    mode = _Watch(blocks, list(names), handle, stack)
    with patched_torch(), stack.hooked(), mode:
        yield


class _Stack(ModuleStack):
    """The stack of running modules; counts additions of each module from the beginning of a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.counts: Counter[str] = Counter()
        self.watched = 0

    def enter(self, module: nn.Module, args: Any) -> None:
        """Begin to count anew with each forward of the network."""
        if not self.stack:
            self.counts.clear()
        super().enter(module, args)
        self.calls.clear()


class _Watch(TorchFunctionMode):
    """Finds the additions by the module that runs, and their number among its additions."""

    def __init__(self, blocks: ResidualBlocks, names: list[str], handle: Handle, stack: _Stack) -> None:
        super().__init__()
        streams = {place: stream for places in blocks.places for place, (_, stream) in places.items()}
        self.places = {
            blocks.blocks[name].place: (name, streams[blocks.blocks[name].place]) for name in names
        }
        self.handle, self.stack = handle, stack

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in args if isinstance(value, Tensor)]
        if getattr(func, "__name__", "") not in _ADDITIONS or len(tensors) != 2 or len(args) != 2:
            return func(*args, **kwargs)
        if tensors[0].shape != tensors[1].shape:
            return func(*args, **kwargs)
        place = self.stack.innermost, self.stack.counts[self.stack.innermost]
        self.stack.counts[self.stack.innermost] += 1
        if place in self.places:
            name, stream = self.places[place]
            instead = self.handle(name, args[stream], args[1 - stream])
            if instead is not None:
                args = (args[0], instead) if stream == 0 else (instead, args[1])
        return func(*args, **kwargs)
