"""Files of latency tables: the measurements, where they were made, and for which network."""

from __future__ import annotations

import json
import math
import platform
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_costs import dense_trace_of
from lightning_prune.latency.backends import ExecutionName, Piece
from lightning_prune.latency.calibration import Correction
from lightning_prune.latency.interpolation import Lookup
from lightning_prune.latency.profiler import TimingCurve
from lightning_prune.serialization.integrity import (
    Fingerprint,
    sealed,
    unsealed,
)
from lightning_prune.serialization.json_file import read_json
from lightning_prune.utils.atomic import write_text
from lightning_prune.utils.example_inputs import shapes_of

__all__ = [
    "REBUILD",
    "VERSION",
    "LatencyError",
    "Measurements",
    "check_fits",
    "device_name",
    "load",
    "save",
]

VERSION = 2
MAX_COUNT = 2**31  # of channels along one dimension, and of threads
# Share of a network's pieces that a table may lack. After a cut a few may be new: a grouped convolution with one
# channel left per group, for example, is a depthwise one.
MAX_MISSING_SHARE = 0.25
REBUILD = "build a table of your own: another path=, or delete the file (lightning-prune latency --help)"
SETTINGS = ("execution", "device", "threads", "versions", "inputs")


class LatencyError(ValueError):
    """Raised if a latency table cannot be used here; the message says why and what to do."""


def device_name(device: torch.device) -> str:
    """Return the name of a device, without its number.

    Example:
        >>> device_name(torch.device("cpu")).startswith("cpu: ")
        True
    """
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    cpu_info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpu_info.read_text()) if cpu_info.exists() else []
    capability = torch.backends.cpu.get_cpu_capability()
    return f"cpu: {models[0] if models else platform.processor() or platform.machine()}, {capability}"


@dataclass(frozen=True)
class Measurements:
    """The content of a latency table.

    Attributes:
        execution: how networks were run.
        device: name of the device.
        threads: of the processor.
        versions: package -> version, of those that ran the networks.
        inputs: shapes and dtypes of the example input.
        entries: signature of a piece -> its times over channel counts.
        correction: from the sum of the parts to the whole network.
        alone: signatures of pieces that cannot be run alone; their time is in the correction.
        info: date, duration and size of the measurement, for people.
        dense: dtype and shape of the parameters and buffers of the layers that were measured; empty if unknown.
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
    dense: Fingerprint = field(default_factory=dict)

    def curve(self, piece: Piece) -> TimingCurve | None:
        """Return the times of a piece, None if it has none."""
        curve = self.entries.get(piece.signature)
        return curve or self._without_strides.get(_remove_strides(piece.signature))

    def covers(self, piece: Piece) -> bool:
        """Return whether the table was made with such a piece."""
        return self.curve(piece) is not None or piece.signature in self.alone

    @cached_property
    def _without_strides(self) -> dict[str, TimingCurve]:
        """Entries by signature without the order of memory, which has no meaning where one channel is left."""
        return {_remove_strides(signature): curve for signature, curve in self.entries.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            **{name: getattr(self, name) for name in SETTINGS},
            "version": VERSION,
            "info": self.info,
            "correction": asdict(self.correction),
            "alone": self.alone,
            "dense": self.dense,
            "entries": {signature: _curve_to_dict(curve) for signature, curve in self.entries.items()},
        }

    @classmethod
    def from_dict(cls, content: Any) -> Measurements:
        """Restore what :meth:`to_dict` returned.

        Raises:
            LatencyError: something is missing or of the wrong type.
        """
        if not isinstance(content, Mapping) or content.get("version") != VERSION:
            raise LatencyError(f"not a latency table of version {VERSION}; {REBUILD}")
        try:
            settings = {name: content[name] for name in (*SETTINGS, "alone")}
            _check_settings(settings)
            curves = {signature: _curve_from_dict(plain) for signature, plain in content["entries"].items()}
            correction = Correction(**content["correction"])
            coefficients = (correction.constant, correction.even, correction.odd, correction.cold)
            if not all(0 <= float(coefficient) < math.inf for coefficient in coefficients):
                raise ValueError(f"a coefficient is negative or not finite in {correction}")
            dense = {
                str(name): [str(dtype), list(shape)]
                for name, (dtype, shape) in content.get("dense", {}).items()
            }
            return cls(
                **settings, entries=curves, correction=correction, info=dict(content["info"]), dense=dense
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise LatencyError(
                f"damaged latency table ({type(error).__name__}: {error}); {REBUILD}"
            ) from error


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for settings that no table has."""
    kinds = {"execution": str, "device": str, "threads": int, "versions": dict, "inputs": list, "alone": list}
    for name, kind in kinds.items():
        if type(settings[name]) is not kind:
            raise TypeError(f"{name}={str(settings[name])[:40]!r}")
    if not 1 <= settings["threads"] <= MAX_COUNT or not all(
        isinstance(name, str) for name in settings["alone"]
    ):
        raise ValueError(f"threads={settings['threads']}, alone={str(settings['alone'])[:40]}")


def _remove_strides(signature: str) -> str:
    return re.sub(r"@\[[^]]*\]", "", signature)


def _curve_to_dict(curve: TimingCurve) -> dict[str, Any]:
    lookup = curve.lookup
    nanoseconds = [round(value) for value in lookup.values]
    return {"by": curve.by, "axes": lookup.axes, "multiples": lookup.multiples, "ns": nanoseconds}


def _curve_from_dict(plain: Mapping[str, Any]) -> TimingCurve:
    if plain["by"] not in ("counts", "volume"):
        raise ValueError(f"by={plain['by']!r}")
    axes = tuple(tuple(axis) for axis in plain["axes"])
    values = tuple(float(value) for value in plain["ns"])
    multiples = tuple(plain["multiples"])
    if any(number > MAX_COUNT for number in (*multiples, *chain(*axes))):
        raise ValueError(f"a count above {MAX_COUNT}")
    return TimingCurve(plain["by"], Lookup(axes, values, multiples))


def save(measured: Measurements, path: Path) -> None:
    """Write a table as JSON with its checksum; if writing is interrupted, the former file stays."""
    write_text(path, json.dumps(sealed(measured.to_dict()), allow_nan=False))


def load(path: str | Path, verify: bool = True) -> Measurements:
    """Read a table that :func:`save` wrote.

    Args:
        path: the file.
        verify: whether its checksum must be right; files from before there were checksums have none.

    Raises:
        LatencyError: the file is no latency table, or was changed after it was written.
    """
    try:
        content = read_json(path)
    except ValueError as error:
        raise LatencyError(f"{path} is not JSON ({error}); {REBUILD}") from error
    try:
        return Measurements.from_dict(
            unsealed(content, "it", verify) if isinstance(content, dict) else content
        )
    except ValueError as error:
        raise LatencyError(f"{path}: {error}") from error


def check_fits(measured: Measurements, pieces: Sequence[Piece], graph: ChannelGraph) -> None:
    """Raise LatencyError if the table was made for another network or input shape; warn if it lacks a few pieces."""
    evidence = dense_trace_of(graph)
    inputs = shapes_of(evidence.examples[0])
    if inputs != measured.inputs:
        raise LatencyError(
            f"the latency table is for inputs {measured.inputs}, but this network was traced on {inputs}; {REBUILD}"
        )
    _check_missing(measured, pieces)
    for piece in pieces:
        curve = measured.curve(piece)
        axes = curve.lookup.axes if curve is not None and curve.by == "counts" else ()
        for count, axis in zip(piece.dense_counts, axes, strict=False):
            if count > axis[-1]:
                raise LatencyError(
                    f"the latency table is of another network: {piece.layer!r} has {count} channels, but at most "
                    f"{axis[-1]} were measured; {REBUILD}"
                )


def _check_missing(measured: Measurements, pieces: Sequence[Piece]) -> None:
    """Raise LatencyError if the table lacks too many pieces of a network, warn if it lacks any."""
    missing = [piece for piece in pieces if not measured.covers(piece)]
    if not missing:
        return
    summary = (
        f"it lacks {len(missing)} of {len(pieces)} operators, {missing[0].signature} of {missing[0].layer!r}"
    )
    if max(_share(missing, pieces, True), _share(missing, pieces, False)) > MAX_MISSING_SHARE:
        raise LatencyError(f"the latency table is of another network: {summary}; {REBUILD}")
    warnings.warn(
        f"the latency table does not fit exactly: {summary}; their time is taken as 0", stacklevel=3
    )


def _share(missing: Sequence[Piece], pieces: Sequence[Piece], contractions: bool) -> float:
    """Return the share of missing pieces among the contractions, or among all other pieces."""
    total = sum(piece.is_contraction == contractions for piece in pieces)
    return sum(piece.is_contraction == contractions for piece in missing) / max(total, 1)
