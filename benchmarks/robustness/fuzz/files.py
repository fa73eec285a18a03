"""Every kind of file that the package writes: how an example is written, and how it is read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune import (
    PruningRecord,
    RecordError,
    last_checkpoint,
    load_pruned,
    prune_,
    save_pruned,
    trace,
)
from lightning_prune.distillation.teacher import Teacher, TeacherError, load_weights_
from lightning_prune.latency import store
from lightning_prune.latency.interpolation import Lookup
from lightning_prune.latency.profiler import TimingCurve
from lightning_prune.netadapt.rounds import Round
from lightning_prune.netadapt.state import STATE, SearchState
from lightning_prune.reporting.model_size import Sizes
from lightning_prune.reporting.run_folder import SUMMARY, Summary, save_net
from lightning_prune.serialization.saved_network import CHECKPOINT_KEY, INTEGRITY, integrity_of
from lightning_prune.utils.hashing import network_digest

__all__ = ["KINDS", "FileKind"]

SETTINGS = {"budget": 0.5}


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: of the kind, for people.
        file: name of the file.
        write: writes an example into a folder.
        read: returns what is read from the file, nested tensors and plain values; its second argument is ``verify``.
        error: the documented error of a damaged file.
    """

    name: str
    file: str
    write: Callable[[Path], Any]
    read: Callable[[Path, bool], Any]
    error: type[Exception] = RecordError


def dense() -> nn.Module:
    """Return the network that all files are of, with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


@cache
def pruned() -> tuple[nn.Module, PruningRecord]:
    """Return the network after a cut, and the record of the cut."""
    net = dense()
    graph = trace(net, torch.zeros(1, 3, 8, 8))
    return net, prune_(net, graph, graph.layers["0.weight"][:3])


def loaded(path: Path, verify: bool) -> dict[str, Any]:
    """Return the weights that ``load_pruned`` loads; raise AssertionError if it fails and changes the network."""
    net = dense()
    before = network_digest(net)
    try:
        return dict(load_pruned(net, path, verify).state_dict())
    except BaseException:
        assert network_digest(net) == before, "the network was changed"
        raise


def write_checkpoint(path: Path) -> None:
    """Write a file with the entries of one of Lightning's checkpoints."""
    net, record = pruned()
    weights, entry = dict(net.state_dict()), {"record": record.to_dict(), "submodule": None, "copies": {}}
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9).state_dict()
    content = {"epoch": 3, "global_step": 12, "state_dict": weights, "optimizer_states": [optimizer]}
    torch.save({**content, CHECKPOINT_KEY: {**entry, INTEGRITY: integrity_of(weights, entry)}}, path)


def found(path: Path, verify: bool) -> dict[str, Any]:
    """Return the weights of the last checkpoint; raise RecordError if it is passed over with a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        last = last_checkpoint(path.parent)
    if last is None and any("is skipped" in str(warning.message) for warning in caught):
        raise RecordError("passed over")
    assert last == path
    return loaded(last, verify)


def table() -> store.Measurements:
    """Return a latency table made by hand."""
    curve = TimingCurve("counts", Lookup(((1, 4, 8), (1, 4)), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), (4, 1)))
    forms = {"0.weight": ["float32", [8, 3, 3, 3]]}
    entries = {
        "aten::convolution@[1]": curve,
        "aten::relu": TimingCurve("volume", Lookup(((1, 64),), (1.0, 9.0))),
    }
    inputs = [["float32", [1, 3, 8, 8]]]
    place = ("eager", "cpu: any", 1, {"torch": "2"})
    return store.Measurements(*place, inputs, entries, info={"points": 8}, dense=forms)


def write_search(folder: Path) -> None:
    """Write the state of a search after one round."""
    net, record = pruned()
    optimizer = torch.optim.SGD(net.parameters(), 0.1).state_dict()
    state = SearchState.begin(folder, dense(), SETTINGS, optimizer)
    state.take(record, optimizer)
    state.rounds.append(Round(1, "0", 0.8, 0.79, {"0": 0.79}, {"macs": 90}, {"macs": 0.9}, 4, 10, 1.5))
    state.save(net)


def restored(path: Path, verify: bool) -> list[Any]:
    """Return all that continuing a search restores; raise AssertionError if it fails and changes the network."""
    net = dense()
    before, state = network_digest(net), SearchState.begin(path.parent, net, SETTINGS, None)
    try:
        state.restore_(net, lambda: 0.8, verify)
    except BaseException:
        assert network_digest(net) == before, "the network was changed"
        raise
    rounds = [asdict(item) for item in state.rounds]
    return [dict(net.state_dict()), state.record.to_dict(), state.optimizer, rounds]


def summary() -> Summary:
    """Return the summary of a run made by hand."""
    sizes = Sizes(params=10, macs=20, bytes=30)
    results: dict[str, Any] = {"test": {"miou": 0.5}, "curves": [{"loss": 0.5}, {"loss": float("nan")}]}
    results["widths"] = {"0": (8, 5)}
    return Summary("completed", {"a": "1"}, seed=1, epochs=2, dense=sizes, final=sizes, **results)


def taught(path: Path, verify: bool) -> dict[str, Any]:
    """Return the weights of a teacher's file; there is no ``verify``."""
    return dict(load_weights_(dense(), path).state_dict())


KINDS = {
    kind.name: kind
    for kind in (
        FileKind(
            "record",
            "record.json",
            lambda folder: pruned()[1].save(folder / "record.json"),
            lambda path, verify: PruningRecord.load(path, verify).to_dict(),
        ),
        FileKind(
            "safetensors",
            "net.safetensors",
            lambda folder: save_pruned(*pruned(), folder / "net.safetensors"),
            loaded,
        ),
        FileKind("network of a run", "net.pt", lambda folder: save_net(folder / "net.pt", *pruned()), loaded),
        FileKind("checkpoint", "it.ckpt", lambda folder: write_checkpoint(folder / "it.ckpt"), loaded),
        FileKind("last checkpoint", "it.ckpt", lambda folder: write_checkpoint(folder / "it.ckpt"), found),
        FileKind(
            "latency table",
            "table.json",
            lambda folder: store.save(table(), folder / "table.json"),
            lambda path, verify: store.load(path, verify).to_dict(),
            store.LatencyError,
        ),
        FileKind("search state", STATE, write_search, restored, ValueError),
        FileKind(
            "summary of a run",
            SUMMARY,
            lambda folder: summary().save(folder),
            lambda path, verify: asdict(Summary.load(path.parent, verify)),
            ValueError,
        ),
        FileKind(
            "teacher",
            "teacher.pt",
            lambda folder: Teacher(dense()).save(folder / "teacher.pt"),
            taught,
            TeacherError,
        ),
    )
}
