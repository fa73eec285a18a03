"""Compare the speed of the engine with torch-pruning's, network by network; or run one part of ``benchmarks.speed``.

    python -m benchmarks.speed                  # the networks of the zoo that both pass; docs/results/speed.md
    python -m benchmarks.speed --every 4        # each fourth of them, and the twelve named ones
    python -m benchmarks.speed --update         # measures some again, keeps the stored results of the others
    python -m benchmarks.speed --report         # only writes the page again, from the JSON
    python -m benchmarks.speed --label before   # as the figures of an older version, to compare with
    python -m benchmarks.speed PART             # digests, cuts, lines, tracing, selection, ...

Each network has a process of its own, in which both tools take turns. The command goes on where it was stopped:
results are appended to files in ``--folder``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine, versions
from benchmarks.common.pages import ReportFiles, page_parser
from benchmarks.common.parts import run_part
from benchmarks.speed.engine import NAMED, compared
from benchmarks.speed.engine_report import page
from benchmarks.zoo.__main__ import commit
from benchmarks.zoo.worker import SPEED, Limit, context, run

PARTS = ("digests", "cuts", "tracing", "selection", "scaling", "overhead", "training", "lines")
LABELS = ("now", "before")
PRELOAD = ["benchmarks.speed.engine", "torch._dynamo", "torch.fx.experimental.symbolic_shapes"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the networks that have no result yet, and write JSON and page."""
    args = _parse(arguments)
    files = ReportFiles("speed", args.docs)
    if not args.report:
        _measure_all(args)
        content = files.load() if files.data.is_file() else {}
        content[args.label] = _content(args, content.get(args.label, {}) if args.update else {})
        files.save(content)
    text = page(files.load())
    files.write_page(text)
    print(text)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = page_parser("speed", __doc__)
    parser.epilog = f"parts, each with options of its own: {', '.join(PARTS)}"
    add = parser.add_argument
    add("--every", type=int, default=1, help="measure each n-th network of the list, and the named ones")
    add("--update", action="store_true", help="keep stored results of networks that are not measured now")
    add("--label", choices=LABELS, default="now", help="name of these results on the page")
    add("--seconds", type=float, default=300, help="limit of processor time per network")
    add("--folder", type=Path, default=Path("outputs") / "speed", help="folder of the finished results")
    return parser.parse_args(arguments)


def _measure_all(args: argparse.Namespace) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    names = [*NAMED, *(name for name in compared()[:: args.every] if name not in NAMED)]
    finished = {row["network"] for row in _rows(args)}
    forkserver, limit = context(PRELOAD), Limit(args.seconds, 10_000)
    with _results(args).open("a") as results:
        for name in names:
            if name not in finished:
                row = {**run(forkserver, SPEED, name, limit), "commit": commit()}
                results.write(json.dumps(row) + "\n")
                results.flush()
                print(name, row.get("ours"), row.get("peer"), row.get("reason", ""), flush=True)


def _results(args: argparse.Namespace) -> Path:
    return Path(args.folder) / f"runs-{args.label}.jsonl"


def _rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    file = _results(args)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _content(args: argparse.Namespace, stored: dict[str, Any]) -> dict[str, Any]:
    """Return what is stored of this measurement; with the runs in ``stored`` of networks that it has not measured."""
    runs = {row["network"]: row for row in (*stored.get("runs", ()), *_rows(args))}
    date = time.strftime("%Y-%m-%d")
    return {"date": date, "versions": versions(), "machine": machine(), "runs": list(runs.values())}


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in PARTS:
        run_part("speed", PARTS)
    else:
        main()
