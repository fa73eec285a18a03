"""Tests that files which would take far more memory than their size are refused before they are unpacked."""

from __future__ import annotations

import json
import pickle
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_prune import LatencyError, PruningRecord, RecordError, load_pruned
from lightning_prune.latency.store import load
from lightning_prune.reporting.run_folder import Summary

SECONDS, MEGABYTES = 5, 200  # what refusing a file may take; the bombs below would take gigabytes


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def repacked(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, times: int = 1) -> Path:
    """Write an archive like that of ``torch.save``, with ``data`` as its pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("it/data.pkl", data)
        archive.writestr("it/version", "3")
        archive.writestr("it/byteorder", "little")
    if times > 1:  # further names of the same bytes
        with zipfile.ZipFile(path, "a") as archive:
            for number in range(times):
                entry = zipfile.ZipInfo(f"it/data/{number}")
                entry.header_offset, entry.file_size = archive.infolist()[0].header_offset, len(data)
                entry.compress_size, entry.CRC = len(data), archive.infolist()[0].CRC
                archive.filelist.append(entry)
                archive.NameToInfo[entry.filename] = entry
            archive._didModify = True  # type: ignore[attr-defined]
    return path


EMPTY_LISTS = b"\x80\x02](" + b"]" * 15_000_000 + b"e."
BOMBS: dict[str, Callable[[Path], Path]] = {
    "compressed": lambda path: repacked(path, bytes(50_000_000), zipfile.ZIP_DEFLATED),
    "overlapping": lambda path: repacked(path, bytes(1_000_000), times=20),
    "many empty lists": lambda path: repacked(path, EMPTY_LISTS),
    "a large pickle": lambda path: repacked(path, bytes(25_000_000)),
    "many empty lists of before torch 1.6": lambda path: legacy(path),
}


def legacy(path: Path) -> Path:
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(parts) + EMPTY_LISTS)
    return path


@pytest.mark.parametrize("name", BOMBS)
def test_an_archive_that_would_unpack_to_far_more_is_refused(tmp_path: Path, name: str) -> None:
    path, before, start = BOMBS[name](tmp_path / "it.pt"), memory(), time.process_time()
    with pytest.raises(RecordError, match=r"compressed|overlap|no tensors"):
        load_pruned(torch.nn.Linear(1, 1), path)
    assert time.process_time() - start < SECONDS
    assert memory() - before < MEGABYTES


@pytest.mark.parametrize("name", ["record", "table", "summary"])
def test_megabytes_of_nested_values_are_refused_before_they_are_parsed(tmp_path: Path, name: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text('{"version": 1, "kept": [' + "[]," * 5_000_000 + "[]]}")
    before, start = memory(), time.process_time()
    if name == "record":
        with pytest.raises(RecordError, match="too much"):
            PruningRecord.load(path)
    elif name == "table":
        with pytest.raises(LatencyError, match="too much"):
            load(path)
    else:
        with pytest.raises(ValueError, match="too much"):
            Summary.load(tmp_path)
    assert time.process_time() - start < SECONDS
    assert memory() - before < MEGABYTES


def test_nested_values_in_the_metadata_of_a_safetensors_file_are_refused(tmp_path: Path) -> None:
    text = json.dumps({"__metadata__": {"lightning_prune": "[" + "[]," * 2_000_000 + "[]]"}}).encode()
    path = tmp_path / "it.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(RecordError, match="too much"):
        load_pruned(torch.nn.Linear(1, 1), path)
    path.write_bytes((10**12).to_bytes(8, "little") + text)
    with pytest.raises(RecordError, match="header has 1000000000000 bytes"):
        load_pruned(torch.nn.Linear(1, 1), path)


def test_a_tensor_that_repeats_one_value_a_billion_times_is_refused(tmp_path: Path) -> None:
    content = {"weight": torch.zeros(1).expand(10**9, 1), "bias": torch.zeros(1)}
    torch.save({"state_dict": content}, tmp_path / "it.pt")
    before = memory()
    with pytest.raises(RecordError, match="'weight'"):
        load_pruned(torch.nn.Linear(1, 1), tmp_path / "it.pt")
    assert memory() - before < MEGABYTES


@pytest.mark.parametrize("count", [10**400, 2**40, 0, -1, 1.5])
def test_counts_of_a_latency_table_are_in_range(tmp_path: Path, count: float) -> None:
    entry = {"by": "counts", "axes": [[1, count]], "multiples": [], "ns": [1, 2]}
    place = {"execution": "eager", "device": "cpu", "threads": 1, "versions": {}, "inputs": [], "alone": []}
    table = {"version": 2, **place, "info": {}, "correction": {}, "entries": {"relu": entry}}
    path = tmp_path / "it.json"
    for changed in ({}, {"threads": count if count < 1 or count > 2 else 0}):
        path.write_text(json.dumps({**table, **changed}))
        with pytest.raises(LatencyError):
            load(path)
    path.write_text(json.dumps({**table, "entries": {}, "correction": {"even": 10**400}}))
    with pytest.raises(LatencyError):
        load(path)
