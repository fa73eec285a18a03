"""The zoo: what our engine and torch-pruning do to some hundred networks, side by side.

    python -m benchmarks.zoo                                  everything, anew
    python -m benchmarks.zoo --resume                         what is missing
    python -m benchmarks.zoo --resume --only-failed           what is missing, and again what failed for us
    python -m benchmarks.zoo --resume --paired                both again, if both passed but not in turn
    python -m benchmarks.zoo --only 'timm/*' --tools ours     some, one tool
    python -m benchmarks.zoo --report                         only write the tables

Every network runs in a process of its own, one tool after the other, so that both meet the same conditions.
Results are appended to a JSONL file as they come; the newest of a network and tool counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.zoo.networks import Network, catalogue
from benchmarks.zoo.report import write_report
from benchmarks.zoo.worker import TOOLS, Limit, context, run

ROOT = Path(__file__).parents[2]
RIGHT = {"right", "proof only"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for, then write the tables."""
    asked = _parser().parse_args(arguments)
    networks = [network for network in catalogue() if fnmatch(network.name, asked.only)]
    if not asked.report:
        _run_all(networks, asked)
    write_report(list(_newest(asked.results).values()), [n.name for n in catalogue()], asked.docs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="pattern of names, such as 'timm/*'")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--resume", action="store_true", help="keep what the results file already has")
    parser.add_argument("--only-failed", action="store_true", help="repeat what failed for us")
    parser.add_argument("--paired", action="store_true", help="repeat both if both passed, but not in turn")
    parser.add_argument("--report", action="store_true", help="run nothing, write the tables")
    parser.add_argument(
        "--jobs", type=int, default=1, help="networks at a time; more than 1 spoils the times"
    )
    parser.add_argument("--seconds", type=float, default=180, help="limit per process")
    parser.add_argument("--peer-seconds", type=float, default=180, help="the same, for torch-pruning")
    parser.add_argument(
        "--megabytes", type=float, default=10_000, help="limit of resident memory per process"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "outputs" / "zoo.jsonl")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where zoo.md and zoo.json go")
    return parser


def _run_all(networks: Sequence[Network], asked: argparse.Namespace) -> None:
    asked.results.parent.mkdir(parents=True, exist_ok=True)
    if not asked.resume:
        asked.results.unlink(missing_ok=True)
    done = _newest(asked.results)
    todo = [(network, tools) for network in networks if (tools := _missing(network, done, asked))]
    forkserver, commit = context(), _commit()

    def visit(job: tuple[Network, list[str]]) -> Iterator[dict[str, Any]]:
        visit = time.time()
        for tool in job[1]:
            limit = Limit(asked.seconds if tool == TOOLS[0] else asked.peer_seconds, asked.megabytes)
            yield {
                **run(forkserver, tool, job[0].name, limit),
                "commit": commit,
                "at": _now(),
                "visit": visit,
            }

    with ThreadPoolExecutor(asked.jobs) as pool, asked.results.open("a") as results:
        for number, rows in enumerate(pool.map(lambda job: list(visit(job)), todo), 1):
            for row in rows:
                results.write(json.dumps(row) + "\n")
                print(f"{number}/{len(todo)} {line(row)}", flush=True)
            results.flush()


def _missing(
    network: Network, done: dict[tuple[str, str], dict[str, Any]], asked: argparse.Namespace
) -> list[str]:
    """The tools that still have to see a network. A failure of ours is repeated alone."""
    missing = [tool for tool in asked.tools if (network.name, tool) not in done]
    ours = done.get((network.name, TOOLS[0]))
    if asked.only_failed and ours is not None and ours.get("verdict") not in RIGHT:
        return list(dict.fromkeys([TOOLS[0], *missing]))
    rows = [done.get((network.name, tool), {}) for tool in TOOLS]
    if asked.paired and all(row.get("status") in ("proven", "passed") for row in rows):
        return [] if rows[0]["visit"] == rows[1]["visit"] else list(TOOLS)
    return missing


def _newest(results: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if results.exists():
        for text in results.read_text().splitlines():
            row = json.loads(text)
            rows[row["network"], row["tool"]] = row
    return rows


def line(row: dict[str, Any]) -> str:
    """One row in one line."""
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


def _commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")


if __name__ == "__main__":
    main()
