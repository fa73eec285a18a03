"""Prune some 400 public networks with this package and with torch-pruning, under the same conditions.

    python -m benchmarks.zoo                                  all networks from the beginning; hours
    python -m benchmarks.zoo --resume                         those without a result
    python -m benchmarks.zoo --resume --only-failed           also repeat ours where it failed
    python -m benchmarks.zoo --resume --paired                repeat both where both passed at different times
    python -m benchmarks.zoo --only 'timm/*' --tools ours     a part of the networks, one tool
    python -m benchmarks.zoo --report                         only write the page again

Each network runs in a process of its own, with one tool directly after the other, so that both have the same
conditions. Each result is appended to a JSONL file; the page shows the newest result of a network and tool. Without
that file, ``--report`` uses the JSON of the page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.common.pages import ReportFiles, page_parser
from benchmarks.zoo.networks import Network, catalogue
from benchmarks.zoo.report import save_rows, write_page
from benchmarks.zoo.worker import TOOLS, Limit, context, run

ROOT = Path(__file__).parents[2]
SUCCESSES = {"right", "proof only"}
Rows = dict[tuple[str, str], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen networks, then write the page."""
    args = _parse(arguments)
    networks = catalogue()
    if not args.report:
        _run_all([network for network in networks if fnmatch(network.name, args.only)], args)
    files = ReportFiles("zoo", args.docs)
    rows = list(_newest(args.results).values())
    if rows:
        save_rows(rows, [network.name for network in networks], files)
    write_page(files)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = page_parser("zoo", __doc__)
    add = parser.add_argument
    add("--only", default="*", help="pattern of network names, such as 'timm/*'")
    add("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    add("--resume", action="store_true", help="keep the results of the file, run what is missing")
    add("--only-failed", action="store_true", help="with --resume: repeat ours where it failed")
    add("--paired", action="store_true", help="with --resume: repeat both that passed at different times")
    add("--jobs", type=int, default=1, help="networks at a time; with more than 1 the times are wrong")
    add("--seconds", type=float, default=180, help="limit of processor time per process, ours")
    add("--peer-seconds", type=float, default=180, help="the same for torch-pruning")
    add("--megabytes", type=float, default=10_000, help="limit of resident memory per process")
    add("--results", type=Path, default=ROOT / "outputs" / "zoo.jsonl", help="file of all results")
    return parser.parse_args(arguments)


def _run_all(networks: Sequence[Network], args: argparse.Namespace) -> None:
    args.results.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        args.results.unlink(missing_ok=True)
    finished = _newest(args.results)
    todo = [(network, tools) for network in networks if (tools := _missing(network, finished, args))]
    forkserver, version = context(), commit()

    def visit(job: tuple[Network, list[str]]) -> list[dict[str, Any]]:
        network, tools = job
        return _visit(network, tools, args, forkserver, version)

    with ThreadPoolExecutor(args.jobs) as pool, args.results.open("a") as results:
        for number, rows in enumerate(pool.map(visit, todo), 1):
            for row in rows:
                results.write(json.dumps(row) + "\n")
                print(f"{number}/{len(todo)} {line(row)}", flush=True)
            results.flush()


def _visit(
    network: Network, tools: Sequence[str], args: argparse.Namespace, forkserver: Any, commit: str
) -> list[dict[str, Any]]:
    """Run the tools on one network, one after the other; rows of the same visit can be compared in time."""
    rows, visit = [], time.time()
    for tool in tools:
        limit = Limit(args.seconds if tool == TOOLS[0] else args.peer_seconds, args.megabytes)
        row = run(forkserver, tool, network.name, limit)
        rows.append({**row, "commit": commit, "at": time.strftime("%Y-%m-%d %H:%M"), "visit": visit})
    return rows


def _missing(network: Network, finished: Rows, args: argparse.Namespace) -> list[str]:
    """Return the tools that are still to run on a network. A failure of ours is repeated without the other tool."""
    missing = [tool for tool in args.tools if (network.name, tool) not in finished]
    ours = finished.get((network.name, TOOLS[0]))
    if args.only_failed and ours is not None and ours.get("verdict") not in SUCCESSES:
        return list(dict.fromkeys([TOOLS[0], *missing]))
    rows = [finished.get((network.name, tool), {}) for tool in TOOLS]
    if args.paired and all(row.get("status") in ("proven", "passed") for row in rows):
        return [] if rows[0]["visit"] == rows[1]["visit"] else list(TOOLS)
    return missing


def _newest(results: Path) -> Rows:
    rows: Rows = {}
    if results.exists():
        for text in results.read_text().splitlines():
            row = json.loads(text)
            rows[row["network"], row["tool"]] = row
    return rows


def line(row: dict[str, Any]) -> str:
    """Format a row as one line of text."""
    seconds = sum(row.get("wall", {}).values())
    errors = " ".join(f"{key} {row[key]:.0e}" for key in ("dead", "zeroed", "effect") if key in row)
    share = "".join(f" {key} {row[key]:.2f}" for key in ("share", "lowest") if key in row)
    verdict = row.get("verdict", "")
    retries = f" retries {len(row['retried'])}" if row.get("retried") else ""
    reason = f" | {row['reason'][:160]}" if "reason" in row else ""
    return (
        f"{row['network']} {row['tool']} {row['status']} {verdict} {seconds:.2f} s of {row['total']:.0f} "
        f"{errors}{share}{retries}{reason}"
    )


def commit() -> str:
    """Return the short hash of the present commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
