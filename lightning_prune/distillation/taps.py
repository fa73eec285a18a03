"""Where a network is listened to, and which of its channels are still there (level 3).

A *tap* is a module whose output is compared with the teacher's. Its channels carry ids, as everything does while a
network is traced, and so a :class:`~lightning_prune.serialization.record.PruningRecord` says which of them survive.
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

__all__ = ["ChannelIndex", "Tap", "TapCandidates", "listening", "survey"]

MOST_STAGES = 12  # of networks that go back and forth between resolutions, only the last of each is taken
BLOCKS = 4  # of a network with one resolution


@dataclass(frozen=True)
class ChannelIndex:
    """One index of a parameter that lives and dies with a channel."""

    name: str
    dim: int
    index: int


@dataclass(frozen=True)
class Tap:
    """The output of a module.

    Attributes:
        name: of the module.
        shape: of its output on the example input.
        dim: along which the channels run.
        witnesses: for each channel, an index of a parameter that is removed with it; None: it stays.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    witnesses: tuple[ChannelIndex | None, ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """The sizes of all dimensions but batch and channels."""
        return tuple(size for dim, size in enumerate(self.shape) if dim not in (0, self.dim))

    def kept(self, record: PruningRecord) -> list[int]:
        """The channels that survive a record of the whole network, ascending.

        Example:
            >>> tap = Tap("conv", (1, 3, 8, 8), 1, tuple(Witness("conv.weight", 0, i) for i in range(3)))
            >>> tap.kept(PruningRecord({"conv.weight": {0: [0, 2]}}, {"conv.weight": [3, 1, 3, 3]}))
            [0, 2]
        """
        alive = {
            (name, dim): set(indices) for name, dims in record.kept.items() for dim, indices in dims.items()
        }

        def lives(witness: ChannelIndex | None) -> bool:
            survivors = alive.get((witness.name, witness.dim)) if witness else None
            return survivors is None or witness is None or witness.index in survivors

        return [channel for channel, witness in enumerate(self.witnesses) if lives(witness)]

    def channels_first(self, features: Tensor) -> Tensor:
        """``(n, c, ...)`` whatever the network's own layout."""
        return features.movedim(self.dim, 1)


@dataclass(frozen=True)
class _TapOutput:
    """One module's output while the network was traced."""

    name: str
    tensor: Tensor
    dim: int

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(size for dim, size in enumerate(self.tensor.shape) if dim not in (0, self.dim))


class TapCandidates:
    """Every module's output in one traced forward.

    Attributes:
        output: what the network returned: meta or fake tensors, of which only the shapes mean anything.
    """

    def __init__(self, model: nn.Module, tracker: Tracker, heard: list[tuple[str, Any]]) -> None:
        self._modules = dict(model.named_modules())
        self._tracker = tracker
        self._components = tracker.ties.components()
        self.output: Any = next((out for name, out in reversed(heard) if not name), None)
        filters = [tracker.sources[name][dim] for name, dim in tracker.filters.items()]
        self._filters = self._components_of(filters)
        self._outputs = self._components_of(self._ids(tensors_in(self.output)))
        single = [(name, out) for name, out in heard if isinstance(out, Tensor) and out.dim() >= 2 and name]
        self._heard = [_TapOutput(name, out, self._channel_dim(out)) for name, out in single]

    def tap(self, name: str) -> Tap:
        """The tap of that name.

        Raises:
            ValueError: there is no such module, it did not run, or its output is not one tensor.
        """
        found = [heard for heard in self._heard if heard.name == name]
        if not found:
            raise ValueError(self._no_tap(name))
        heard = found[-1]
        witnesses = self._witnesses(heard.tensor, heard.dim)
        return Tap(name, tuple(map(int, heard.tensor.shape)), heard.dim, witnesses)

    def stages(self) -> list[str]:
        """The last module of each stretch of the network that works at one resolution, in the order they run.

        The network's own output is left out, and what has a single position. Networks with one resolution
        (transformers) are taken at four of their repeated blocks instead.

        Raises:
            ValueError: nothing has positions.
        """
        spatial = [heard for heard in self._heard if self._is_stage(heard)]
        if not spatial:
            raise ValueError(
                "no module of the network has maps or tokens as its output: name the taps yourself"
            )
        if blocks := _blocks(spatial, self._modules):
            return blocks
        runs = [list(run) for _, run in groupby(spatial, key=_resolution)]
        if len(runs) > MOST_STAGES:
            last = {_resolution(run[-1]): run for run in runs}
            runs = [run for run in runs if last[_resolution(run[-1])] is run]
        return [_outermost(run) for run in runs]

    def _is_stage(self, heard: _TapOutput) -> bool:
        """Several positions of each sample (not of windows, say), and not what the network returns."""
        samples = {len(tensor) for tensor in tensors_in(self.output) if tensor.dim()}
        whole = not samples or len(heard.tensor) in samples
        return whole and _resolution(heard) > 1 and not self._is_output(heard.tensor)

    def _ids(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [ids for tensor in tensors for arrays in self._tracker.labels(tensor) for ids in arrays]

    def _components_of(self, arrays: Iterable[Tensor]) -> Units:
        return np.unique(
            np.concatenate([self._components[ids.numpy()] for ids in arrays] or [np.empty(0, int)])
        )

    def _is_output(self, tensor: Tensor) -> bool:
        own = self._components_of(self._ids([tensor]))
        return bool(len(own)) and bool(np.isin(own, self._outputs).all())

    def _channel_dim(self, tensor: Tensor) -> int:
        """The dimension along which most filters run; else as is usual for maps and for tokens."""
        usual = tensor.dim() - 1 if tensor.dim() == 3 else 1
        filters = {
            dim: len(np.intersect1d(self._components_of(arrays), self._filters))
            for dim, arrays in enumerate(self._tracker.labels(tensor))
            if dim
        }
        return max(filters, key=lambda dim: (filters[dim], dim == usual))

    def _witnesses(self, tensor: Tensor, dim: int) -> tuple[ChannelIndex | None, ...]:
        arrays = self._tracker.labels(tensor)[dim]
        if not arrays:
            return (None,) * tensor.shape[dim]
        wanted = self._components[arrays[0].numpy()]
        known: dict[int, ChannelIndex] = {}
        for name, dims in self._tracker.sources.items():
            for axis, ids in dims.items():
                own = self._components[ids.numpy()]
                for index in np.flatnonzero(np.isin(own, wanted)).tolist():
                    known.setdefault(int(own[index]), ChannelIndex(name, axis, index))
        return tuple(known.get(component) for component in wanted.tolist())

    def _no_tap(self, name: str) -> str:
        if name in self._modules:
            return f"{name!r} cannot be tapped: it does not run in eval mode, or its output is not one tensor"
        near = get_close_matches(name, self._modules, n=3, cutoff=0.3) or [h.name for h in self._heard[:3]]
        return f"no module {name!r} to tap; did you mean {' or '.join(map(repr, near))}?"


def survey(model: nn.Module, example: Example) -> TapCandidates:
    """Trace a network and listen to all of its modules. Nothing about it changes.

    Args:
        model: any eager network.
        example: positional and keyword inputs.

    Raises:
        TraceError: the network raises on its example input.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3),
        ...                     nn.Flatten(), nn.Linear(72, 2))
        >>> found = survey(net, ((torch.zeros(1, 1, 12, 12),), {}))
        >>> found.stages(), found.tap("1").witnesses[3]
        (['1', '2', '3'], Witness(name='0.weight', dim=0, index=3))
    """
    heard: list[tuple[str, Any]] = []

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            heard.append((name, out))

        return hook

    handles = [m.register_forward_hook(listen(name)) for name, m in model.named_modules()]
    handles.append(model.register_forward_pre_hook(lambda module, args: heard.clear()))  # a second attempt
    tracker = Tracker(model)
    try:
        analyse(tracker, example[0], example[1], (False,))
    finally:
        for handle in handles:
            handle.remove()
    return TapCandidates(model, tracker, heard)


@contextmanager
def listening(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the named modules in the forwards that follow, the last of each."""
    heard: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            heard[name] = out

        return hook

    handles = [model.get_submodule(name).register_forward_hook(listen(name)) for name in names]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _resolution(heard: _TapOutput) -> int:
    """How many positions: 56 x 56 pixels and 3136 tokens are one stage."""
    return int(np.prod(heard.positions))


def _outermost(run: Sequence[_TapOutput]) -> str:
    """Of the modules that returned the run's last tensor, the one that ended last."""
    return [heard for heard in run if heard.tensor is run[-1].tensor][-1].name


def _blocks(heard: Sequence[_TapOutput], modules: dict[str, nn.Module]) -> list[str]:
    """Of a transformer: up to four of the shallowest, then longest, row of siblings of one composed class."""
    rows: dict[tuple[str, type], list[str]] = defaultdict(list)
    sizes = {one.name: (one.tensor.dim(), _resolution(one)) for one in heard}
    for name in sizes:
        if any(modules[name].children()):
            rows[name.rpartition(".")[0], type(modules[name])].append(name)
    repeated = [row for row in rows.values() if len(row) > 1]
    row = min(repeated, key=lambda row: (row[0].count("."), -len(row)), default=[])
    if len({sizes[name] for name in row}) != 1 or sizes[row[0]][0] != 3:
        return []
    count = min(BLOCKS, len(row))
    return [row[(step + 1) * len(row) // count - 1] for step in range(count)]
