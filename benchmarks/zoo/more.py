"""Prune some 200 networks of other packages to half of their MACs, and at random, and check each with an oracle.

    python -m benchmarks.zoo.more                            all networks; those with a result are kept
    python -m benchmarks.zoo.more --again 'monai/*'          networks of these names (patterns) again
    python -m benchmarks.zoo.more --report                   only write the page again

Each network runs in a process of its own, with limits of time and memory; its result is a file in the folder. A
network whose package is missing has the status "not installed".
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.common.pages import ReportFiles, page_parser
from benchmarks.zoo.more_report import ORACLES, save_rows, write_page
from benchmarks.zoo.strangers.case import Case
from benchmarks.zoo.strangers.catalogue import catalogue
from benchmarks.zoo.worker import STRANGERS, Limit, context, run
from lightning_prune.utils.atomic import write_text

ROOT = Path(__file__).parents[2]
PRELOAD = [
    "benchmarks.zoo.strangers.cut",
    "torchvision",
    "transformers",
    "torch.fx.experimental.symbolic_shapes",
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen networks, then write the page."""
    args = _parse(arguments)
    networks = catalogue()
    if not args.report:
        _run_all([network for network in networks if _is_named(network.name, args.names)], args)
    files = ReportFiles("zoo_more", args.docs)
    if rows := _rows(args.folder):
        save_rows(rows, [network.name for network in networks], files)
    write_page(files)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = page_parser("zoo.more", __doc__ or "")
    add = parser.add_argument
    add("names", nargs="*", default=["*"], help="networks, or patterns such as 'monai/*'")
    add("--again", action="store_true", help="run also networks with a result")
    add("--seconds", type=float, default=300, help="limit of processor time per network")
    add("--megabytes", type=float, default=8_000, help="limit of resident memory per network")
    add(
        "--folder",
        type=Path,
        default=ROOT / "outputs" / "zoo_more",
        help="of the results, one file per network",
    )
    return parser.parse_args(arguments)


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _run_all(networks: Sequence[Case], args: argparse.Namespace) -> None:
    """Run the networks without a result, or all of them, and write a file for each."""
    args.folder.mkdir(parents=True, exist_ok=True)
    forkserver, limit = context(PRELOAD), Limit(args.seconds, args.megabytes)
    todo = [network for network in networks if args.again or not _file(args.folder, network.name).exists()]
    for number, network in enumerate(todo, 1):
        row = {**run(forkserver, STRANGERS, network.name, limit), "at": time.strftime("%Y-%m-%d %H:%M")}
        write_text(_file(args.folder, network.name), json.dumps(row, indent=1))
        print(f"{number}/{len(todo)} {_line(row)}", flush=True)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '__')}.json"


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def _line(row: dict[str, Any]) -> str:
    """Format a row as one line of text."""
    cuts = {kind: row[kind] for kind in ("half", "random", "free") if kind in row}
    parts = [
        f"{kind} {cut.get('verdict', cut['status'])} {cut.get('share', '')} "
        f"{min((cut[name] for name in ORACLES if name in cut), default=-1):.0e} "
        + f"refused {len(cut['refusals'])}"
        * bool(cut.get("refusals"))
        for kind, cut in cuts.items()
    ]
    reason = row.get("reason") or next((cut["reason"] for cut in cuts.values() if "reason" in cut), "")
    lowest = f"lowest {row['lowest']:.2f}" if "lowest" in row else ""
    return (
        f"{row['network']} {row['status']} {row['total']:.0f} s {lowest} {' | '.join(parts)} {reason[:200]}"
    )


if __name__ == "__main__":
    main()
