"""Latency as a resource: looked up in a table that was measured on the device (level 3).

After NetAdapt (Yang et al., ECCV 2018), which keeps a table per layer over (channels in, channels out). Here every
operator has one, norms, activations and resampling too, and what the whole network takes beyond the sum of its
parts is measured on a few random cuts.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import torch

from lightning_prune.batches import shapes_of
from lightning_prune.executions import EXECUTIONS, ExecutionName, Piece, versions_of
from lightning_prune.graph import ChannelGraph, Term
from lightning_prune.latency_build import Correction, Entry, Place, Track, corrected, entries, parts
from lightning_prune.lookup import Lookup
from lightning_prune.processes import shared
from lightning_prune.record import LARGEST
from lightning_prune.resources import evidence_of

__all__ = ["LatencyError", "LatencyTable", "Measurements", "device_name"]

VERSION = 1
UNKNOWN_SHARE = (
    0.25  # of a network's pieces, that a table need not know: one channel left looks like something else
)
REBUILD = "build a table of your own: another path=, or delete the file (lightning-prune latency --help)"


class LatencyError(ValueError):
    """A latency table cannot be used here; the message says why and what to do."""


def device_name(device: torch.device) -> str:
    """What the device is called, without its number.

    Example:
        >>> device_name(torch.device("cpu")).startswith("cpu: ")
        True
    """
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    capability = torch.backends.cpu.get_cpu_capability()
    return f"cpu: {models[0] if models else platform.processor() or platform.machine()}, {capability}"


@dataclass(frozen=True)
class Measurements:
    """What was measured, and where.

    Attributes:
        execution: how networks were run.
        device: name of the device.
        threads: of the processor.
        versions: of what ran them.
        inputs: shapes and dtypes of the example input.
        entries: signature of an operator -> its times over channel counts.
        correction: from the sum of the parts to the whole.
        alone: signatures of what cannot be run alone; the correction makes up for it.
        info: facts for people: when it was measured, and for how long.
    """

    execution: ExecutionName
    device: str
    threads: int
    versions: dict[str, str]
    inputs: list[Any]
    entries: dict[str, Entry]
    correction: Correction = field(default_factory=Correction)
    alone: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    def entry(self, piece: Piece) -> Entry | None:
        """The times of a piece; None if it has none."""
        return self.entries.get(piece.signature) or self._by_kind.get(_without_strides(piece.signature))

    def knows(self, piece: Piece) -> bool:
        """Whether the piece was there when the table was made."""
        return self.entry(piece) is not None or piece.signature in self.alone

    @cached_property
    def _by_kind(self) -> dict[str, Entry]:
        """Entries by signature without the order of memory, which means nothing where one channel is left."""
        return {_without_strides(signature): each for signature, each in self.entries.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {
            kind: {
                "by": each.by,
                "axes": each.lookup.axes,
                "ns": [round(value) for value in each.lookup.values],
            }
            for kind, each in self.entries.items()
        }
        return {
            **{
                name: getattr(self, name) for name in ("execution", "device", "threads", "versions", "inputs")
            },
            "version": VERSION,
            "info": self.info,
            "correction": asdict(self.correction),
            "alone": self.alone,
            "entries": plain,
        }

    @classmethod
    def from_dict(cls, plain: Any) -> Measurements:
        """The inverse of :meth:`to_dict`.

        Raises:
            LatencyError: something is missing or of the wrong kind.
        """
        if not isinstance(plain, Mapping) or plain.get("version") != VERSION:
            raise LatencyError(f"not a latency table of version {VERSION}; {REBUILD}")
        try:
            held = {
                name: plain[name]
                for name in ("execution", "device", "threads", "versions", "inputs", "alone")
            }
            found = {kind: _entry(each) for kind, each in plain["entries"].items()}
            correction = Correction(**plain["correction"])
            if not min(correction.constant, correction.even, correction.odd) >= 0:
                raise ValueError(f"a correction that is negative: {correction}")
            return cls(**held, entries=found, correction=correction, info=dict(plain["info"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LatencyError(
                f"damaged latency table ({type(error).__name__}: {error}); {REBUILD}"
            ) from error


def _without_strides(signature: str) -> str:
    return re.sub(r"@\[[^]]*\]", "", signature)


def _entry(plain: Mapping[str, Any]) -> Entry:
    if plain["by"] not in ("counts", "volume"):
        raise ValueError(f"by={plain['by']!r}")
    axes = tuple(tuple(axis) for axis in plain["axes"])
    return Entry(plain["by"], Lookup(axes, tuple(float(value) for value in plain["ns"])))


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
    cuts: int = 6
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
    def place(self) -> Place:
        """Where it is measured."""
        return Place(self.execution, torch.device(self.device), self.threads or torch.get_num_threads())

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
        whole = correction.constant + float(parts(pieces, found) @ [correction.even, correction.odd])
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
            self.execution, device_name(place.device), place.threads, versions_of(self.execution),
            shapes_of((evidence.inputs, evidence.kwargs)),
            sorted({piece.signature for piece in EXECUTIONS[self.execution].pieces(graph)}),
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
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


def save(measured: Measurements, path: Path) -> None:
    """Write JSON; an interrupted write leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(measured.to_dict()))
    beside.replace(path)


def load(path: str | Path) -> Measurements:
    """Read what :func:`save` wrote.

    Raises:
        LatencyError: the file is no latency table.
    """
    if (size := Path(path).stat().st_size) > LARGEST:
        raise LatencyError(f"{path} has {size} bytes; a latency table has at most {LARGEST}")
    try:
        return Measurements.from_dict(json.loads(Path(path).read_text()))
    except LatencyError as error:
        raise LatencyError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise LatencyError(f"{path} is not JSON ({error}); {REBUILD}") from error


def check_fits(measured: Measurements, pieces: Sequence[Piece], graph: ChannelGraph) -> None:
    """Raise LatencyError if the table was made for another network or input shape."""
    evidence = evidence_of(graph)
    inputs = shapes_of((evidence.inputs, evidence.kwargs))
    if inputs != measured.inputs:
        raise LatencyError(
            f"the latency table is for inputs {measured.inputs}, this network is traced on {inputs}; {REBUILD}"
        )
    other = "the latency table is of another network"
    unknown = [piece for piece in pieces if not measured.knows(piece)]
    if unknown:
        told = f"it lacks {len(unknown)} of {len(pieces)} operators, {unknown[0].signature} of {unknown[0].layer!r}"
        if max(_share(unknown, pieces, True), _share(unknown, pieces, False)) > UNKNOWN_SHARE:
            raise LatencyError(f"{other}: {told}; {REBUILD}")
        warnings.warn(f"the latency table does not fit quite: {told}; they count as nothing", stacklevel=2)
    for piece in pieces:
        entry = measured.entry(piece)
        axes = entry.lookup.axes if entry is not None and entry.by == "counts" else ()
        for count, axis in zip(piece.most, axes, strict=False):
            if count > axis[-1]:
                raise LatencyError(
                    f"{other}: {piece.layer!r} has {count} channels, measured were up to {axis[-1]}; {REBUILD}"
                )


def _share(unknown: Sequence[Piece], pieces: Sequence[Piece], contracts: bool) -> float:
    """Share of the pieces that are unknown, among those that are contractions, or are not."""
    of = sum(piece.contracts == contracts for piece in pieces)
    return sum(piece.contracts == contracts for piece in unknown) / max(of, 1)


def _term(piece: Piece, measured: Measurements) -> Term:
    """The nanoseconds of a piece as a function of its channel counts."""
    entry, correction = measured.entry(piece), measured.correction
    assert entry is not None

    def nanoseconds(*counts: int) -> float:
        return correction.factor(counts) * entry.time(piece, *counts)

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
