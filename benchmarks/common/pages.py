"""Files of a report: its page, its numbers as JSON, and its picture."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machines, versions
from lightning_prune.utils.atomic import write_text

__all__ = ["RESULTS", "ReportFiles", "cell", "docs_parser", "mean_spread", "page_parser"]

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@dataclass(frozen=True)
class ReportFiles:
    """The files of one report: ``NAME.md``, ``data/NAME.json`` and ``figures/NAME.png``.

    Args:
        name: of the report.
        folder: that holds the pages; by default ``docs/results`` of this repository.

    Example:
        >>> files = ReportFiles("zoo", Path("results"))
        >>> files.page.as_posix(), files.data.as_posix(), files.figure.as_posix()
        ('results/zoo.md', 'results/data/zoo.json', 'results/figures/zoo.png')
    """

    name: str
    folder: Path = RESULTS

    @property
    def page(self) -> Path:
        """Path of the page (Markdown)."""
        return self.folder / f"{self.name}.md"

    @property
    def data(self) -> Path:
        """Path of the numbers (JSON)."""
        return self.folder / "data" / f"{self.name}.json"

    @property
    def figure(self) -> Path:
        """Path of the picture (PNG); its folder is created."""
        path = self.folder / "figures" / f"{self.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def load(self) -> dict[str, Any]:
        """Return the stored numbers; raise FileNotFoundError if there are none."""
        if not self.data.is_file():
            raise FileNotFoundError(
                f"no results yet: {self.data} does not exist. Run without --report first."
            )
        return dict(json.loads(self.data.read_text()))

    def runs(self) -> list[dict[str, Any]]:
        """Return the stored runs of a study, to which further ones are added; none without a file."""
        return list(self.load()["runs"]) if self.data.is_file() else []

    def save(self, content: dict[str, Any]) -> None:
        """Write the numbers."""
        write_text(self.data, json.dumps(content, indent=1) + "\n")

    def save_runs(self, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Write the runs of a study with date, versions and machine, and return all of it.

        Runs from another machine name it under ``"machine"``. Without runs nothing is written, and the stored numbers
        are returned.
        """
        if not runs:
            return self.load()
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "versions": versions(),
            "machine": machines(runs),
            "threads": 1,
        }
        content["runs"] = list(runs)
        self.save(content)
        return content

    def write_page(self, text: str) -> None:
        """Write the whole page."""
        write_text(self.page, text)

    def write_section(self, mark: str, text: str) -> None:
        """Write ``text`` between ``<!-- mark -->`` and ``<!-- /mark -->``; without marks, at the page's end.

        The rest of the page, written by hand, stays.
        """
        begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        page = self.page.read_text() if self.page.is_file() else f"# {self.name.capitalize()}\n\n"
        before, _, rest = page.partition(begin)
        self.write_page("\n".join([before + begin, text, end]) + (rest.partition(end)[2] or "\n"))


def docs_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option that all commands share that write into the folder of the pages.

    Args:
        name: of the command's module below ``benchmarks``.
        description: of which the first line is shown.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(description or "").split("\n")[0]
    )
    parser.add_argument("--docs", type=Path, default=RESULTS, help="folder of the page and data/")
    return parser


def page_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return the same parser for a command that writes a page."""
    parser = docs_parser(name, description)
    parser.add_argument("--report", action="store_true", help="measure nothing, write the page from its JSON")
    return parser


def cell(text: str, length: int = 160) -> str:
    """Return a text as a cell of a Markdown table: one line without bars, cut off at ``length``.

    Example:
        >>> cell("a | b\\nc")
        'a / b c'
    """
    return " ".join(text.replace("|", "/").split())[:length]


def mean_spread(values: Sequence[float], digits: int = 3, scale: float = 1.0) -> str:
    """Format mean and sample standard deviation; one value has no deviation, no value gives an empty text.

    Example:
        >>> mean_spread([0.25, 0.75], 1, 100), mean_spread([0.5]), mean_spread([])
        ('50.0 ± 35.4', '0.500', '')
    """
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values) * scale:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values) * scale:.{digits}f}{deviation}"
