"""Pages of the docs that hold a part made by a command, between two marks."""

from __future__ import annotations

from pathlib import Path

__all__ = ["replace_between"]


def replace_between(page: Path, mark: str, text: str) -> None:
    """Put ``text`` between ``<!-- mark -->`` and ``<!-- /mark -->``; at the end where there are no marks yet."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = (page.read_text() if page.is_file() else f"# {page.stem}\n\n").partition(begin)
    page.write_text("\n".join([before + begin, text, end]) + (rest.partition(end)[2] or "\n"))
