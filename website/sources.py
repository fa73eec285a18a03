"""Collect the files of the site in one folder: pages, notebooks, pictures, data, theme."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

from website.links import relinked
from website.navigation import Entry, listed_pages, navigation
from website.notebooks import title, write_notebook_page
from website.reference import packages, page

__all__ = ["collect", "entries", "targets"]

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
MOVED = {
    "README.md": "start.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "docs/index.md": "overview.md",
    "website/home.md": "index.md",
}


def targets() -> dict[str, str]:
    """Return path in the repository -> path in the site, of pages, notebooks, pictures and data."""
    files = sorted(path for path in (ROOT / "docs").rglob("*") if path.is_file())
    names = [path.relative_to(ROOT).as_posix() for path in files]
    return {
        **{name: name.removeprefix("docs/") for name in names},
        **{path.relative_to(ROOT).as_posix(): f"notebooks/{path.stem}.md" for path in _notebooks()},
        **MOVED,
    }


def entries() -> list[Entry]:
    """Return the navigation of the site."""
    notebooks = {f"notebooks/{path.stem}.md": title(path) for path in _notebooks()}
    reference = {f"reference/{package}.md": package.rpartition(".")[2] for package in packages()}
    return navigation(
        listed_pages((ROOT / "docs" / "index.md").read_text(encoding="utf-8")), notebooks, reference
    )


def collect(folder: Path) -> None:
    """Write all files of the site into ``folder``, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE / "theme", folder / "theme")
    for source, target in targets().items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".ipynb"):
            relink = partial(relinked, source=source, target=target, targets=targets())
            write_notebook_page(ROOT / source, folder / target, relink)
        elif source.endswith(".md"):
            (folder / target).write_text(_page(source, target), encoding="utf-8")
        else:
            shutil.copy(ROOT / source, folder / target)
    (folder / "reference").mkdir()
    for package in packages():
        (folder / "reference" / f"{package}.md").write_text(page(package), encoding="utf-8")


def _notebooks() -> list[Path]:
    """Return the notebooks in the order in which ``docs/index.md`` names them, others after them."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    return sorted((ROOT / "notebooks").glob("*.ipynb"), key=lambda path: index.find(path.name) % len(index))


def _page(source: str, target: str) -> str:
    text = (ROOT / source).read_text(encoding="utf-8")
    if source == "README.md":
        text = text.replace("# lightning-prune", "# Get started", 1)
    if source == "website/home.md":
        text = _with_parts_of(text, (ROOT / "README.md").read_text(encoding="utf-8"))
    return relinked(text, source, target, targets())


def _with_parts_of(text: str, readme: str) -> str:
    """Return the front page with the first program of the README and its first table with names of rows."""
    code = re.search(r"^```python\n.*?^```$", readme, flags=re.DOTALL | re.MULTILINE)
    table = re.search(r"^\| \|.*?(?=\n\n)", readme, flags=re.DOTALL | re.MULTILINE)
    if code is None or table is None:
        raise ValueError("the README has no Python block, or no table")
    return text.replace("<!-- code of the README -->", code[0]).replace(
        "<!-- table of the README -->", table[0]
    )
