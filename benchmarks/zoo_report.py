"""The zoo's tables: JSON for programs, Markdown for people, the summary first."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_report(rows: list[dict[str, Any]], names: list[str], docs: Path) -> None:
    """To come."""
