"""Latency as a resource: looked up in a table that was measured on the device (level 3).

After NetAdapt (Yang et al., ECCV 2018), which keeps a table per layer over (channels in, channels out). Here every
operator has one, norms, activations and resampling too, and what the whole network takes beyond the sum of its
parts is measured on a few random cuts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.costs import Term
from lightning_prune.graph.layer_costs import evidence_of
from lightning_prune.latency.backends import EXECUTIONS, ExecutionName, Piece, versions_of
from lightning_prune.latency.calibration import Correction, corrected, parts
from lightning_prune.latency.profiler import BackendSettings, Track, entries
from lightning_prune.latency.store import (
    REBUILD,
    VERSION,
    LatencyError,
    Measurements,
    check_fits,
    device_name,
    load,
    save,
)
from lightning_prune.utils.distributed import shared
from lightning_prune.utils.example_inputs import shapes_of
from lightning_prune.utils.hashing import json_digest

__all__ = ["LatencyTable"]


@dataclass
class LatencyTable:
    """The resource ``"latency"``: nanoseconds of one forward on the example input, on one device.

    The first graph that it is asked about is measured, unless ``path`` has a table, which is then checked: made
    on the same device, with as many threads, the same versions and input shapes, and for the same operators.
    Times on a single thread of the processor are processor time; otherwise they are of the clock.

    Args:
        path: a ``.json`` file to read, or to write if it is not there; or a folder with a file for each network,
            input shape and device; None: keep it in memory.
        execution: ``"eager"``; ``"compiled"``: by ``torch.compile``, where operators are measured eagerly, those that
            are fused left out, and only the random cuts are compiled, half a minute or more each; or ``"onnx"``: by
            ONNX Runtime, which needs ``lightning-prune[export]``.
        device: where to run, as torch names it.
        threads: of the processor; by default as many as torch has.
        cuts: random cuts on which the sum of the parts is held against the whole network; 0: it is taken as it is.
        elsewhere: take the table as it is although it was measured on another device or with other versions.

    Raises:
        ValueError: an execution that there is not, or ``"compiled"`` with less than two cuts.
        LatencyError: when called: the table is damaged, or was made for something else.

    Example:
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 2, 1))
        >>> table = LatencyTable(threads=1, cuts=0)
        >>> graph = trace(net, torch.zeros(1, 3, 32, 32))
        >>> measured = table.build(graph)
        >>> graph = graph.with_resources({"latency": table})
        >>> 0 < graph.cost("latency", remove=range(31)) < graph.cost("latency")
        True
    """

    path: str | Path | None = None
    execution: ExecutionName = "eager"
    device: str = "cpu"
    threads: int | None = None
    cuts: int = 8
    elsewhere: bool = False
    measured: Measurements | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.execution not in EXECUTIONS:
            known = ", ".join(map(repr, get_args(ExecutionName)))
            raise ValueError(f"execution must be one of {known}, got {self.execution!r}")
        if self.cuts < 0 or (self.threads is not None and self.threads < 1):
            raise ValueError(f"need cuts >= 0 and threads >= 1, got cuts={self.cuts}, threads={self.threads}")
        if self.execution == "compiled" and self.cuts < 2:
            raise ValueError(
                f"execution='compiled' needs cuts >= 2, got cuts={self.cuts}: parts are measured eagerly"
            )

    @property
    def place(self) -> BackendSettings:
        """Where it is measured."""
        return BackendSettings(
            self.execution, torch.device(self.device), self.threads or torch.get_num_threads()
        )

    def __call__(self, graph: ChannelGraph) -> list[Term]:
        """One term for every operator, and one for what the whole takes beyond them."""
        if self.measured is None:
            self.measured = _by_the_first(partial(self._obtained, graph))
        pieces = EXECUTIONS[self.execution].pieces(graph)
        check_fits(self.measured, pieces, graph)
        found = [_term(piece, self.measured) for piece in pieces if self.measured.entry(piece) is not None]
        return [Term("", round(self.measured.correction.constant), ()), *found]

    def build(self, graph: ChannelGraph, track: Track = lambda indices: indices) -> Measurements:
        """Measure the network of ``graph``, and write the table if there is a ``path``.

        Args:
            graph: of the dense network.
            track: shows progress.
        """
        place, start, evidence = self.place, time.perf_counter(), evidence_of(graph)
        pieces = EXECUTIONS[self.execution].pieces(graph)
        found, alone = entries(pieces, place, track)
        correction = corrected(graph, found, place, self.cuts)
        whole = float(correction.whole(parts(pieces, found)))
        info = {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "seconds": round(time.perf_counter() - start, 1),
            "points": sum(len(each.lookup.values) for each in found.values()),
            "milliseconds": round(whole / 1e6, 3),
        }
        inputs = shapes_of((evidence.inputs, evidence.kwargs))
        self.measured = Measurements(
            self.execution, device_name(place.device), place.threads, versions_of(self.execution), inputs,
            found, correction, alone, info,
        )  # fmt: skip
        if (file := self.file(graph)) is not None:
            save(self.measured, file)
        return self.measured

    def refit(self, graph: ChannelGraph, remove: Sequence[int]) -> Correction:
        """Measure the cut that is wanted as well, and fit the correction anew, most of all to it.

        A prediction is as good as the random cuts are like the one that a criterion chooses. So: select, refit, and
        select again, on ``graph.with_resources(...)`` called anew. No file is written.

        Args:
            graph: of the dense network that the table was built for.
            remove: units that shall go, as :attr:`Plan.remove <lightning_prune.Plan>` has them.

        Raises:
            ValueError: the table has no measurements yet.
        """
        if self.measured is None:
            raise ValueError(
                "nothing is measured yet: call build(graph), or graph.with_resources(...), first"
            )
        chosen = [int(unit) for unit in remove]
        correction = corrected(graph, self.measured.entries, self.place, self.cuts, chosen=chosen)
        self.measured = replace(self.measured, correction=correction)
        return correction

    def file(self, graph: ChannelGraph) -> Path | None:
        """Where the table of this network is kept."""
        if self.path is None or Path(self.path).suffix == ".json":
            return None if self.path is None else Path(self.path)
        evidence, place = evidence_of(graph), self.place
        made_by = [
            VERSION, self.execution, device_name(place.device), place.threads, versions_of(self.execution),
            shapes_of((evidence.inputs, evidence.kwargs)),
            sorted({piece.signature for piece in EXECUTIONS[self.execution].pieces(graph)}),
        ]  # fmt: skip
        name = json_digest(made_by)[:12]
        return Path(self.path) / f"{self.execution}-{name}.json"

    def _obtained(self, graph: ChannelGraph) -> Measurements:
        file = self.file(graph)
        if file is not None and file.exists():
            found = load(file)
            self._check_made_here(found, file)
            return found
        print(
            f"measuring latency, {self.execution} on {self.device}{f', for {file}' if file else ''}",
            flush=True,
        )
        return self.build(graph)

    def _check_made_here(self, found: Measurements, file: Path) -> None:
        place = self.place
        here: dict[str, Any] = {"execution": self.execution}
        if not self.elsewhere:
            here |= {"device": device_name(place.device), "threads": place.threads}
            here |= {"versions": versions_of(self.execution)}
        apart = [
            f"{name} {getattr(found, name)!r}, here it is {value!r}"
            for name, value in here.items()
            if getattr(found, name) != value
        ]
        if apart:
            otherwise = "Or, to prune for that device, set elsewhere=True"
            raise LatencyError(f"{file} was measured with {'; '.join(apart)}. Either {REBUILD}. {otherwise}")


def _term(piece: Piece, measured: Measurements) -> Term:
    """The nanoseconds of a piece as a function of its channel counts."""
    entry, correction = measured.entry(piece), measured.correction
    assert entry is not None

    def nanoseconds(*counts: int) -> float:
        return correction.time(piece, entry, *counts)

    if not piece.factors:
        return Term(piece.layer, round(nanoseconds()), ())
    return Term(piece.layer, 1, tuple(piece.factors), nanoseconds)


def _by_the_first(obtain: Callable[[], Measurements]) -> Measurements:
    """What the first process of a distributed run obtains, for all; its error, if it fails."""
    from torch import distributed

    first = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    found: Measurements | Exception | None = None
    if first:
        try:
            found = obtain()
        except Exception as error:
            found = error
    told = shared(found)
    if isinstance(told, Exception):
        raise told
    assert told is not None
    return told
