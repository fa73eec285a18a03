"""A latency table as it is kept: what was measured, on which device, for which network (level 3)."""

from __future__ import annotations

import json
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_costs import evidence_of
from lightning_prune.latency.backends import ExecutionName, Piece
from lightning_prune.latency.calibration import Correction
from lightning_prune.latency.interpolation import Lookup
from lightning_prune.latency.profiler import TimingCurve
from lightning_prune.serialization.atomic import atomic_write
from lightning_prune.serialization.record import MAX_BYTES
from lightning_prune.utils.example_inputs import shapes_of

__all__ = ["REBUILD", "VERSION", "LatencyError", "Measurements", "check_fits", "device_name", "load", "save"]

VERSION = 2
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
    entries: dict[str, TimingCurve]
    correction: Correction = field(default_factory=Correction)
    alone: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    def entry(self, piece: Piece) -> TimingCurve | None:
        """The times of a piece; None if it has none."""
        return self.entries.get(piece.signature) or self._by_kind.get(_without_strides(piece.signature))

    def knows(self, piece: Piece) -> bool:
        """Whether the piece was there when the table was made."""
        return self.entry(piece) is not None or piece.signature in self.alone

    @cached_property
    def _by_kind(self) -> dict[str, TimingCurve]:
        """Entries by signature without the order of memory, which means nothing where one channel is left."""
        return {_without_strides(signature): each for signature, each in self.entries.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {
            kind: {
                "by": each.by,
                "axes": each.lookup.axes,
                "multiples": each.lookup.multiples,
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
            if not min(correction.constant, correction.even, correction.odd, correction.cold) >= 0:
                raise ValueError(f"a correction that is negative: {correction}")
            return cls(**held, entries=found, correction=correction, info=dict(plain["info"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LatencyError(
                f"damaged latency table ({type(error).__name__}: {error}); {REBUILD}"
            ) from error


def _without_strides(signature: str) -> str:
    return re.sub(r"@\[[^]]*\]", "", signature)


def _entry(plain: Mapping[str, Any]) -> TimingCurve:
    if plain["by"] not in ("counts", "volume"):
        raise ValueError(f"by={plain['by']!r}")
    axes = tuple(tuple(axis) for axis in plain["axes"])
    values = tuple(float(value) for value in plain["ns"])
    return TimingCurve(plain["by"], Lookup(axes, values, tuple(plain["multiples"])))


def save(measured: Measurements, path: Path) -> None:
    """Write JSON; an interrupted write leaves what was there before."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(measured.to_dict()))


def load(path: str | Path) -> Measurements:
    """Read what :func:`save` wrote.

    Raises:
        LatencyError: the file is no latency table.
    """
    if (size := Path(path).stat().st_size) > MAX_BYTES:
        raise LatencyError(f"{path} has {size} bytes; a latency table has at most {MAX_BYTES}")
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
