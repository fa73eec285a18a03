"""Studies of many runs: divided among processes, resumable, one line of JSON per result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common.pages import RESULTS

__all__ = ["Row", "finished", "jobs", "study", "study_parser"]

Row = dict[str, Any]


def jobs(*choices: Sequence[Any], part: str = "1/1") -> list[Any]:
    """Return the i-th of n parts of all combinations, ordered by the first choice, which is the seed.

    A study that is stopped early so has complete results for its first seeds.

    Example:
        >>> jobs((0, 1), ("a", "b"), part="2/2")
        [(0, 'b'), (1, 'b')]
    """
    number, parts = map(int, part.split("/"))
    return list(product(*choices))[number - 1 :: parts]


def finished(folder: Path) -> list[Row]:
    """Return the results that all processes have written to ``folder`` so far."""
    paths = sorted(folder.glob("runs*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def study(
    todo: Sequence[Any],
    folder: Path,
    part: str,
    run: Callable[[Any], Iterable[Row]],
    job_of: Callable[[Row], Any],
) -> None:
    """Run the jobs that have no result yet, and write the rows of each job when it has ended.

    Args:
        todo: the jobs.
        folder: of the results; those of all parts are read, so that no job is repeated.
        part: ``i/n``, which names the file that this process writes.
        run: returns the rows of one job.
        job_of: returns the job that a row belongs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"runs-{part.replace('/', '-of-')}.jsonl"
    for job in todo:
        if job in {job_of(row) for row in finished(folder)}:
            continue
        rows = list(run(job))
        with file.open("a") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)


def study_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all studies share.

    Args:
        name: of the study's package; its results lie in ``outputs/<name>``.
        description: of which the first line is shown.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description.split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--part", default="1/1", help="i/n: run the i-th of n parts, one process each")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs") / name, help="folder of finished runs and networks"
    )
    parser.add_argument("--docs", type=Path, default=RESULTS, help="folder of the page, data/ and figures/")
    parser.add_argument(
        "--report",
        action="store_true",
        help="run nothing; write the page from the finished runs, or from its JSON if there are none",
    )
    parser.add_argument("--small", action="store_true", help="runs of a few seconds, to try the command")
    return parser
