"""Run all checks on a GPU, or small ones on the CPU.

python -m benchmarks.gpu [--small] [--checks WORD ...] [--limit SECONDS] [--out FOLDER]
python -m benchmarks.gpu --report
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.machine import machine, versions
from benchmarks.common.pages import ReportFiles, page_parser
from benchmarks.gpu import engine, latency, memory, methods, training
from benchmarks.gpu.checks import Check, Place, Row, run_check
from benchmarks.gpu.report import page
from lightning_prune.utils.atomic import write_text

__all__ = ["CHECKS", "main"]

NAME = "gpu"
#: What inductor compiles takes longest and comes last.
GROUPS = ("correctness", "latency", "memory", "compiled")
MODULES = (training, engine, methods, latency, memory)
CHECKS: list[Check] = sorted(
    (check for module in MODULES for check in module.CHECKS), key=lambda check: GROUPS.index(check.group)
)
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "lightning",
    "segmentation-models-pytorch",
    "timm",
    "onnxruntime",
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = page_parser(NAME, __doc__)
    add = parser.add_argument
    add("--small", action="store_true", help="tiny networks")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--checks", nargs="+", metavar="WORD", help="only checks whose name or group has one of these words")
    add(
        "--skip",
        nargs="+",
        default=[],
        metavar="WORD",
        help="leave out checks whose name or group has one of these words",
    )
    add("--limit", type=float, default=1e9, metavar="SECONDS", help="start no check after this time")
    add("--out", type=Path, default=Path("outputs/gpu"), help="folder of gpu.json")
    add(
        "--resume", action="store_true", help="keep the results in gpu.json, and make only checks without one"
    )
    return parser.parse_args(arguments)


def selected(words: Sequence[str] | None, skip: Sequence[str] = ()) -> list[Check]:
    """Return the checks whose name or group has one of the words (all without words), and none of ``skip``."""

    def has(check: Check, words: Sequence[str]) -> bool:
        return any(word.lower() in f"{check.group}: {check.name}".lower() for word in words)

    return [check for check in CHECKS if (words is None or has(check, words)) and not has(check, skip)]


def head(place: Place) -> dict[str, Any]:
    """Return date, versions and device."""
    content = {"date": time.strftime("%Y-%m-%d %H:%M"), "versions": versions(PACKAGES), "small": place.small}
    if place.device.type != "cuda":
        return {**content, "device": machine(), "cores": os.cpu_count()}
    properties = torch.cuda.get_device_properties(0)
    details = {"memory_gb": round(properties.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return {**content, "device": properties.name, "cores": os.cpu_count(), **details}


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Make the checks, and write the results after each of them."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    file, start = args.out / "gpu.json", time.perf_counter()
    rows: list[Row] = json.loads(file.read_text())["rows"] if args.resume and file.is_file() else []
    place = Place(
        torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device),
        args.small,
        folder,
    )
    for check in selected(args.checks, args.skip):
        if any(row["name"] == check.name for row in rows):
            continue
        late = time.perf_counter() - start > args.limit
        # Written before, so that a check which ends the process is not made again.
        _write(file, place, start, [*rows, _without_result(check, "failed", "the process died")])
        rows.append(
            _without_result(check, "skipped", "no time was left") if late else run_check(check, place)
        )
        _write(file, place, start, rows)
        line = f"{rows[-1]['outcome']:8}{rows[-1]['seconds']:6.1f} s  {check.name}"
        print(f"{line}  {rows[-1]['reason'][:300]}", flush=True)
        if rows[-1].get("sticky"):  # this process cannot use the GPU any more
            again = _again(args, time.perf_counter() - start)
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *again])
    return rows


def _write(file: Path, place: Place, start: float, rows: Sequence[Row]) -> None:
    content = {**head(place), "seconds": round(time.perf_counter() - start, 1), "rows": list(rows)}
    write_text(file, json.dumps(content, indent=1) + "\n")


def _without_result(check: Check, outcome: str, reason: str) -> Row:
    row = {"name": check.name, "group": check.group, "outcome": outcome, "reason": reason}
    return {**row, "figures": {}, "seconds": 0.0}


def _again(args: argparse.Namespace, seconds: float) -> list[str]:
    """Return the command line for the checks that are left."""
    line = ["--resume", "--device", args.device, "--out", str(args.out), "--limit", str(args.limit - seconds)]
    line += ["--small"] if args.small else []
    line += ["--checks", *args.checks] if args.checks else []
    return line + (["--skip", *args.skip] if args.skip else [])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the checks and print the page, or write it from the JSON; exit with 1 if a check failed."""
    args = parse(arguments)
    files = ReportFiles(NAME, args.docs)
    if args.report:
        files.write_page(page(files.load()))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    print(page(json.loads((args.out / "gpu.json").read_text())))
    if any(row["outcome"] == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
