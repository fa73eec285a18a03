"""x"""

from pathlib import Path
from lightning_prune.runs import Summary


def draw_report(summary: Summary, path: Path) -> None:
    """X."""


def show_run(summary: Summary, folder: Path) -> None:
    """X."""
    print(summary.test, summary.dense, summary.final)
