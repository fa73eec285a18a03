"""Pages of the docs that hold a part made by a command, between two marks."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.machine import machine, versions

__all__ = ["mean_spread", "replace_between", "save_runs"]


def mean_spread(values: Sequence[float], digits: int = 3, scale: float = 1.0) -> str:
    """Mean and sample standard deviation, as far as there are values for them.

    Example:
        >>> mean_spread([0.25, 0.75], 1, 100), mean_spread([0.5]), mean_spread([])
        ('50.0 ± 35.4', '0.500', '')
    """
    if not values:
        return ""
    beside = f" ± {statistics.stdev(values) * scale:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values) * scale:.{digits}f}{beside}"


def save_runs(rows: Sequence[dict[str, Any]], path: Path) -> dict[str, Any]:
    """Write the results of a study on one thread as JSON; what stands beside them: date, versions, machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"date": time.strftime("%Y-%m-%d"), "versions": versions(), "machine": machine(), "threads": 1}
    path.write_text(json.dumps({**head, "runs": list(rows)}, indent=1) + "\n")
    return head


def replace_between(page: Path, mark: str, text: str) -> None:
    """Put ``text`` between ``<!-- mark -->`` and ``<!-- /mark -->``; at the end where there are no marks yet."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = (page.read_text() if page.is_file() else f"# {page.stem}\n\n").partition(begin)
    page.write_text("\n".join([before + begin, text, end]) + (rest.partition(end)[2] or "\n"))
