"""Studies of many runs: shared among processes, stopped and started again, one line of JSON per result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

__all__ = ["Row", "arguments", "finished", "jobs", "study"]

Row = dict[str, Any]


def jobs(*choices: Sequence[Any], part: str = "1/1") -> list[Any]:
    """The i-th of n parts of all combinations, the first choice (seeds) outermost: what is left off stays whole.

    Example:
        >>> jobs((0, 1), ("a", "b"), part="2/2")
        [(0, 'b'), (1, 'b')]
    """
    number, of = map(int, part.split("/"))
    return list(product(*choices))[number - 1 :: of]


def finished(folder: Path) -> list[Row]:
    """The results of all processes so far."""
    paths = sorted(folder.glob("runs*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def study(
    todo: Sequence[Any],
    folder: Path,
    part: str,
    run: Callable[[Any], Iterable[Row]],
    job_of: Callable[[Row], Any],
) -> None:
    """Run what has no result yet, and write the rows of each run when it has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"runs-{part.replace('/', '-of-')}.jsonl"
    for job in todo:
        if job in {job_of(row) for row in finished(folder)}:
            continue
        rows = list(run(job))
        with file.open("a") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)


def arguments(module: str, about: str) -> argparse.ArgumentParser:
    """What every study can be asked; results lie in ``outputs/`` and the tables in ``docs/``."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=about.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n processes")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs") / module, help="of results and networks"
    )
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[2] / "docs")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is there")
    parser.add_argument(
        "--small", action="store_true", help="seconds a run, for a test of the command itself"
    )
    return parser
