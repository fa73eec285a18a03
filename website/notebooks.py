"""Notebooks as Markdown with their stored pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat

__all__ = ["title", "write_notebook_page"]


def title(path: Path) -> str:
    """Return the first heading of a notebook."""
    return str(nbformat.read(path, as_version=4).cells[0].source).splitlines()[0].removeprefix("# ")


def write_notebook_page(path: Path, page: Path, relink: Callable[[str], str]) -> None:
    """Write a notebook with its stored outputs as the Markdown page ``page``; pictures and notebook go beside it.

    Args:
        path: the notebook.
        page: the file to write.
        relink: rewrites the links of a Markdown cell.
    """
    from nbconvert import MarkdownExporter  # a part of the docs extra

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = relink(cell.source) if cell.cell_type == "markdown" else cell.source
    resources = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=resources)
    for name, content in resources["outputs"].items():
        (page.parent / name).parent.mkdir(exist_ok=True)
        (page.parent / name).write_bytes(content)
    shutil.copy(path, page.parent)
    heading, rest = text.lstrip().split("\n", 1)
    download = f"[Download this notebook]({path.name}){{ .md-button }}"
    page.write_text(f"{heading}\n{rest.rstrip()}\n\n{download}\n", encoding="utf-8")
