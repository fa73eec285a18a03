"""Taps: the modules whose outputs student and teacher are compared by, and their channels through pruning.

The channels of a tap carry ids while the network is traced, and so does every index of its parameters. A
:class:`~lightning_prune.serialization.record.PruningRecord` therefore says which channels of a tap are left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_prune.graph.trace import analyse
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.tracing.calls import tensors_in
from lightning_prune.tracing.ids import Units
from lightning_prune.tracing.tracker import Tracker
from lightning_prune.utils.example_inputs import Example

__all__ = ["ChannelIndex", "Tap", "TapCandidates", "record_outputs", "trace_taps"]

MOST_STAGES = 12  # with more, as where resolutions alternate, only the last stage of each resolution is used
MOST_BLOCKS = 4  # of a network with one resolution


@dataclass(frozen=True)
class ChannelIndex:
    """An index of a parameter that is removed together with a channel."""

    name: str
    dim: int
    index: int


@dataclass(frozen=True)
class Tap:
    """The output of a module.

    Attributes:
        name: qualified name of the module.
        shape: shape of the output on the example input.
        dim: dimension of the channels.
        channel_indices: for each channel, an index of a parameter that is removed with it; None: the channel
            cannot be removed.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    channel_indices: tuple[ChannelIndex | None, ...]

    @property
    def channels(self) -> int:
        """Number of channels of the dense network."""
        return self.shape[self.dim]

    @property
    def positions(self) -> tuple[int, ...]:
        """Sizes of all dimensions but batch and channels."""
        return tuple(size for dim, size in enumerate(self.shape) if dim not in (0, self.dim))

    def kept(self, record: PruningRecord) -> list[int]:
        """Return the channels that are left after the pruning in a record of the whole network, ascending.

        Example:
            >>> tap = Tap("conv", (1, 3, 8, 8), 1, tuple(ChannelIndex("conv.weight", 0, i) for i in range(3)))
            >>> tap.kept(PruningRecord({"conv.weight": {0: [0, 2]}}, {"conv.weight": [3, 1, 3, 3]}))
            [0, 2]
        """
        kept = {
            (name, dim): set(indices) for name, dims in record.kept.items() for dim, indices in dims.items()
        }

        def is_kept(entry: ChannelIndex | None) -> bool:
            if entry is None or (entry.name, entry.dim) not in kept:
                return True
            return entry.index in kept[entry.name, entry.dim]

        return [channel for channel, entry in enumerate(self.channel_indices) if is_kept(entry)]

    def channels_first(self, features: Tensor) -> Tensor:
        """Return features in the network's layout as ``(n, c, ...)``."""
        return features.movedim(self.dim, 1)


@dataclass(frozen=True)
class _TapOutput:
    """A module's output in the traced forward."""

    name: str
    tensor: Tensor
    dim: int

    @property
    def resolution(self) -> int:
        """Number of positions: 56 x 56 pixels and 3136 tokens have the same resolution."""
        return int(np.prod([size for dim, size in enumerate(self.tensor.shape) if dim not in (0, self.dim)]))


class TapCandidates:
    """The outputs of all modules in one traced forward.

    Args:
        model: the traced network.
        tracker: ids of its channels.
        outputs: name and output of each module, in the order in which they returned.

    Attributes:
        output: the network's output, as meta or fake tensors, which have shapes but no values.
    """

    def __init__(self, model: nn.Module, tracker: Tracker, outputs: list[tuple[str, Any]]) -> None:
        self._modules = dict(model.named_modules())
        self._tracker = tracker
        self._components = tracker.ties.components()
        self.output: Any = next((out for name, out in reversed(outputs) if not name), None)
        filters = [tracker.sources[name][dim] for name, dim in tracker.filters.items()]
        self._filters = self._components_of(filters)
        self._output_components = self._components_of(self._ids(tensors_in(self.output)))
        single = [(name, out) for name, out in outputs if isinstance(out, Tensor) and out.dim() >= 2 and name]
        self._tap_outputs = [_TapOutput(name, out, self._channel_dim(out)) for name, out in single]

    def tap(self, name: str) -> Tap:
        """Return the tap at a module; if the module ran several times, at its last output.

        Raises:
            ValueError: there is no such module, it did not run, or its output is not one tensor.
        """
        matches = [output for output in self._tap_outputs if output.name == name]
        if not matches:
            raise ValueError(self._no_tap(name))
        tensor, dim = matches[-1].tensor, matches[-1].dim
        return Tap(name, tuple(map(int, tensor.shape)), dim, self._channel_indices(tensor, dim))

    def stages(self) -> list[str]:
        """Return the last module of each resolution stage, in the order in which they run.

        A stage is a part of the network that works at one resolution. The network's own output is left out, and so
        are outputs with a single position. Of networks with one resolution (transformers), four of the repeated
        blocks are returned instead.

        Raises:
            ValueError: no output has positions.
        """
        spatial = [output for output in self._tap_outputs if self._is_in_stage(output)]
        if not spatial:
            raise ValueError(
                "no module of the network has maps or tokens as its output: name the taps yourself"
            )
        if blocks := _repeated_blocks(spatial, self._modules):
            return blocks
        runs = [list(run) for _, run in groupby(spatial, key=lambda output: output.resolution)]
        if len(runs) > MOST_STAGES:
            last_runs = {run[-1].resolution: run for run in runs}
            runs = [run for run in runs if last_runs[run[-1].resolution] is run]
        return [_outermost_module(run) for run in runs]

    def _is_in_stage(self, output: _TapOutput) -> bool:
        """Whether an output has a row per sample (not per window) and several positions, and is no network output."""
        batch_sizes = {len(tensor) for tensor in tensors_in(self.output) if tensor.dim()}
        per_sample = not batch_sizes or len(output.tensor) in batch_sizes
        return per_sample and output.resolution > 1 and not self._is_network_output(output.tensor)

    def _ids(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [ids for tensor in tensors for arrays in self._tracker.labels(tensor) for ids in arrays]

    def _components_of(self, arrays: Iterable[Tensor]) -> Units:
        return np.unique(
            np.concatenate([self._components[ids.numpy()] for ids in arrays] or [np.empty(0, int)])
        )

    def _is_network_output(self, tensor: Tensor) -> bool:
        """Whether all channels of a tensor are channels of the network's output."""
        components = self._components_of(self._ids([tensor]))
        return bool(len(components)) and bool(np.isin(components, self._output_components).all())

    def _channel_dim(self, tensor: Tensor) -> int:
        """Return the dimension with most filters; of equals, that of channels in maps or in tokens."""
        usual = tensor.dim() - 1 if tensor.dim() == 3 else 1
        filters = {
            dim: len(np.intersect1d(self._components_of(arrays), self._filters))
            for dim, arrays in enumerate(self._tracker.labels(tensor))
            if dim
        }
        return max(filters, key=lambda dim: (filters[dim], dim == usual))

    def _channel_indices(self, tensor: Tensor, dim: int) -> tuple[ChannelIndex | None, ...]:
        """Return for each channel the first parameter index that is removed with it."""
        arrays = self._tracker.labels(tensor)[dim]
        if not arrays:
            return (None,) * tensor.shape[dim]
        channels = self._components[arrays[0].numpy()]
        indices: dict[int, ChannelIndex] = {}
        for name, dims in self._tracker.sources.items():
            for axis, ids in dims.items():
                components = self._components[ids.numpy()]
                for index in np.flatnonzero(np.isin(components, channels)).tolist():
                    indices.setdefault(int(components[index]), ChannelIndex(name, axis, index))
        return tuple(indices.get(component) for component in channels.tolist())

    def _no_tap(self, name: str) -> str:
        """Return the error message for a name that is no tap."""
        if name in self._modules:
            return f"{name!r} cannot be tapped: it does not run in eval mode, or its output is not one tensor"
        near = get_close_matches(name, self._modules, n=3, cutoff=0.3)
        near = near or [output.name for output in self._tap_outputs[:3]]
        return f"no module {name!r} to tap; did you mean {' or '.join(map(repr, near))}?"


def trace_taps(model: nn.Module, example: Example) -> TapCandidates:
    """Trace a network and collect the outputs of all of its modules. The network is not changed.

    Args:
        model: any eager network.
        example: positional and keyword inputs.

    Raises:
        TraceError: the network raises on its example input.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3),
        ...                     nn.Flatten(), nn.Linear(72, 2))
        >>> candidates = trace_taps(net, ((torch.zeros(1, 1, 12, 12),), {}))
        >>> candidates.stages(), candidates.tap("1").channel_indices[3]
        (['1', '2', '3'], ChannelIndex(name='0.weight', dim=0, index=3))
    """
    outputs: list[tuple[str, Any]] = []

    def store_as(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            outputs.append((name, out))

        return hook

    handles = [module.register_forward_hook(store_as(name)) for name, module in model.named_modules()]
    # Tracing may run the network several times: keep the outputs of the last one.
    handles.append(model.register_forward_pre_hook(lambda module, args: outputs.clear()))
    tracker = Tracker(model)
    try:
        analyse(tracker, [example], (False,))
    finally:
        for handle in handles:
            handle.remove()
    return TapCandidates(model, tracker, outputs)


@contextmanager
def record_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the latest output of each named module in the forwards inside the block.

    Yields:
        Name of a module -> its latest output; filled while forwards run.
    """
    outputs: dict[str, Tensor] = {}

    def store_as(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            outputs[name] = out

        return hook

    handles = [model.get_submodule(name).register_forward_hook(store_as(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _outermost_module(run: Sequence[_TapOutput]) -> str:
    """Return the outermost of the modules that returned the last tensor of a run: it returned last."""
    return [output for output in run if output.tensor is run[-1].tensor][-1].name


def _repeated_blocks(outputs: Sequence[_TapOutput], modules: dict[str, nn.Module]) -> list[str]:
    """Return up to four evenly spaced blocks of a transformer; nothing for other networks.

    Blocks are modules of one class with children, in one parent, that all return tokens of one size. Of several
    such rows, the one nearest to the root is used, and of these the longest.
    """
    rows: dict[tuple[str, type], list[str]] = defaultdict(list)
    sizes = {output.name: (output.tensor.dim(), output.resolution) for output in outputs}
    for name in sizes:
        if any(modules[name].children()):
            rows[name.rpartition(".")[0], type(modules[name])].append(name)
    repeated = [row for row in rows.values() if len(row) > 1]
    row = min(repeated, key=lambda row: (row[0].count("."), -len(row)), default=[])
    if len({sizes[name] for name in row}) != 1 or sizes[row[0]][0] != 3:
        return []
    count = min(MOST_BLOCKS, len(row))
    return [row[(step + 1) * len(row) // count - 1] for step in range(count)]
