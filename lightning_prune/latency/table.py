"""Latency as a resource: looked up in a table that was measured on the device.

After NetAdapt (Yang et al., ECCV 2018), which has a table per layer over (channels in, channels out). Here every
operator has a table, also norms, activations and resampling, and the difference between a whole network and the sum
of its parts is measured on a few random cuts.
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
from lightning_prune.graph.layer_costs import dense_trace_of
from lightning_prune.latency.backends import EXECUTIONS, ExecutionName, Piece, package_versions
from lightning_prune.latency.calibration import Correction, calibrate, measured_ratio, sum_parts
from lightning_prune.latency.closed_loop import ClosedLoop
from lightning_prune.latency.network_check import check_network, dense_layers
from lightning_prune.latency.profiler import BackendSettings, Track, measure_curves
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
from lightning_prune.selection.plan import Plan
from lightning_prune.utils.distributed import from_first
from lightning_prune.utils.example_inputs import shapes_of
from lightning_prune.utils.hashing import json_digest

__all__ = ["LatencyTable"]


@dataclass
class LatencyTable:
    """The resource ``"latency"``: nanoseconds of one forward on the example input, on one device.

    The network is measured when the table is first called with a graph, unless ``path`` has a table. A table that is
    read must fit: it was made on the same device, with the same number of threads, package versions and input shapes,
    and for the same operators. With one thread of the processor, times are processor time, otherwise wall-clock time.

    Args:
        path: a ``.json`` file, which is read, or written if it does not exist; or a folder with a file for each
            network, input shape and device; None: keep the table in memory.
        execution: ``"eager"``; ``"compiled"``: by ``torch.compile``, where operators are measured eagerly, without
            those that are fused, and only the random cuts are compiled, which takes half a minute or more each; or
            ``"onnx"``: by ONNX Runtime, which needs ``lightning-prune[export]``.
        device: that networks run on, as torch names it.
        threads: of the processor; by default as many as torch uses.
        cuts: random cuts on which the sum of the parts is calibrated; 0: no calibration.
        turns: measure each plan that meets the budget and plan again with corrected predictions, until the measured
            latency is that of the budget, but at most so many times; 0: trust the predictions.
        tolerance: how far the measured latency may be from the budget, as a share of it, to end these turns.
        elsewhere: accept a table that was measured on another device or with other versions.
        verify: refuse a file whose checksum is wrong, and one that was made for a network with other layers.

    Attributes:
        measured: the content of the table, None until it is measured or read.

    Raises:
        ValueError: an unknown execution, ``"compiled"`` with fewer than two cuts, or turns or tolerance out of range.
        LatencyError: when called: the table is damaged, was changed, or was made for something else.

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
    turns: int = 0
    tolerance: float = 0.02
    elsewhere: bool = False
    verify: bool = True
    measured: Measurements | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.execution not in EXECUTIONS:
            names = ", ".join(map(repr, get_args(ExecutionName)))
            raise ValueError(f"execution must be one of {names}, got {self.execution!r}")
        if self.cuts < 0 or (self.threads is not None and self.threads < 1):
            raise ValueError(f"need cuts >= 0 and threads >= 1, got cuts={self.cuts}, threads={self.threads}")
        if self.turns < 0 or not 0 < self.tolerance < 1:
            raise ValueError(
                f"need turns >= 0 and tolerance in (0, 1), got turns={self.turns}, tolerance={self.tolerance}"
            )
        if self.execution == "compiled" and self.cuts < 2:
            raise ValueError(
                f"execution='compiled' needs cuts >= 2, got cuts={self.cuts}: its parts are measured eagerly, so the "
                "time of the compiled network comes from the cuts alone"
            )

    @property
    def place(self) -> BackendSettings:
        """Execution, device and threads with which networks run."""
        return BackendSettings(
            self.execution, torch.device(self.device), self.threads or torch.get_num_threads()
        )

    @property
    def _is_file(self) -> bool:
        """Whether ``path`` is one table, and not a folder of several."""
        return self.path is not None and Path(self.path).suffix == ".json"

    def __call__(self, graph: ChannelGraph) -> list[Term]:
        """Return one term for every operator, and one for the constant time of the whole network."""
        if self.measured is None:
            self.measured = from_first(partial(self._load_or_build, graph))
        pieces = EXECUTIONS[self.execution].pieces(graph)
        check_fits(self.measured, pieces, graph)
        if self.verify and self._is_file:  # in a folder, files are found by what was measured
            check_network(self.measured, dense_layers(pieces, graph))
        terms = [_term(piece, self.measured) for piece in pieces if self.measured.curve(piece) is not None]
        return [Term("", round(self.measured.correction.constant), ()), *terms]

    def build(self, graph: ChannelGraph, track: Track = lambda indices: indices) -> Measurements:
        """Measure the network of ``graph``, and write the table if there is a ``path``.

        Args:
            graph: of the dense network.
            track: shows progress.
        """
        place, start, evidence = self.place, time.perf_counter(), dense_trace_of(graph)
        pieces = EXECUTIONS[self.execution].pieces(graph)
        curves, alone = measure_curves(pieces, place, track)
        correction = calibrate(graph, curves, place, self.cuts)
        nanoseconds = float(correction.network_time(sum_parts(pieces, curves)))
        info = {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "seconds": round(time.perf_counter() - start, 1),
            "points": sum(len(curve.lookup.values) for curve in curves.values()),
            "milliseconds": round(nanoseconds / 1e6, 3),
        }
        self.measured = Measurements(
            self.execution,
            device_name(place.device),
            place.threads,
            package_versions(self.execution),
            shapes_of(evidence.examples[0]),
            curves,
            correction,
            alone,
            info,
            dense_layers(pieces, graph),
        )
        if (file := self.file(graph)) is not None:
            save(self.measured, file)
        return self.measured

    def refit(self, graph: ChannelGraph, remove: Sequence[int]) -> Correction:
        """Measure one more cut, the intended one, and fit the correction again with a large weight on it.

        Predictions are good as far as the random cuts resemble the cut that a criterion chooses. So: select, refit,
        call ``graph.with_resources(...)`` again, and select again. No file is written.

        Args:
            graph: of the dense network that the table was built for.
            remove: units of the intended cut, as in :attr:`Plan.remove <lightning_prune.Plan>`.

        Raises:
            ValueError: the table has no measurements yet.
        """
        if self.measured is None:
            raise ValueError(
                "nothing is measured yet: call build(graph), or graph.with_resources(...), first"
            )
        chosen = [int(unit) for unit in remove]
        correction = calibrate(graph, self.measured.entries, self.place, self.cuts, chosen=chosen)
        self.measured = replace(self.measured, correction=correction)
        return correction

    def settle(self, graph: ChannelGraph, plan_of: Callable[[ChannelGraph], Plan], resource: str) -> Plan:
        """Return a plan whose measured latency is that of its budget, within the tolerance if the turns suffice.

        The predictions of this table are corrected for it, in memory. With ``turns=0`` nothing is measured.

        Args:
            graph: of the network, with this table as a resource.
            plan_of: returns the plan for a graph.
            resource: name of this table among the resources of ``graph``.
        """
        if not self.turns or self.measured is None:
            return plan_of(graph)

        def plan_with(correction: Correction) -> Plan:
            assert self.measured is not None
            if correction is not self.measured.correction:
                self.measured = replace(self.measured, correction=correction)
            return plan_of(graph.with_resources({resource: self}))

        def measure(plan: Plan) -> float:
            return from_first(lambda: measured_ratio(graph, self.place, plan.remove.tolist(), plan.blocks))

        loop = ClosedLoop(resource, self.turns, self.tolerance)
        plan, correction = loop.run(self.measured.correction, plan_with, measure)
        self.measured = replace(self.measured, correction=correction)
        return plan

    def file(self, graph: ChannelGraph) -> Path | None:
        """Return the file of this network's table, None if the table is in memory only."""
        if self.path is None:
            return None
        if self._is_file:
            return Path(self.path)
        evidence, place = dense_trace_of(graph), self.place
        identity = [
            VERSION,
            self.execution,
            device_name(place.device),
            place.threads,
            package_versions(self.execution),
            shapes_of(evidence.examples[0]),
            sorted({piece.signature for piece in EXECUTIONS[self.execution].pieces(graph)}),
        ]
        return Path(self.path) / f"{self.execution}-{json_digest(identity)[:12]}.json"

    def _load_or_build(self, graph: ChannelGraph) -> Measurements:
        file = self.file(graph)
        if file is not None and file.exists():
            measured = load(file, self.verify)
            self._check_settings(measured, file)
            return measured
        suffix = f", for {file}" if file else ""
        print(f"measuring latency, {self.execution} on {self.device}{suffix}", flush=True)
        return self.build(graph)

    def _check_settings(self, measured: Measurements, file: Path) -> None:
        """Raise LatencyError if a table was measured with other settings."""
        place = self.place
        settings: dict[str, Any] = {"execution": self.execution}
        if not self.elsewhere:
            settings |= {"device": device_name(place.device), "threads": place.threads}
            settings |= {"versions": package_versions(self.execution)}
        differences = [
            f"{name} {getattr(measured, name)!r}, here it is {value!r}"
            for name, value in settings.items()
            if getattr(measured, name) != value
        ]
        if differences:
            raise LatencyError(
                f"{file} was measured with {'; '.join(differences)}. Either {REBUILD}. "
                "Or, to prune for that device, set elsewhere=True"
            )


def _term(piece: Piece, measured: Measurements) -> Term:
    """Return the nanoseconds of a piece as a function of its channel counts."""
    curve, correction = measured.curve(piece), measured.correction
    assert curve is not None

    def nanoseconds(*counts: int) -> float:
        return correction.piece_time(piece, curve, *counts)

    if not piece.factors:
        return Term(piece.layer, round(nanoseconds()), ())
    return Term(piece.layer, 1, tuple(piece.factors), nanoseconds)
