"""Navigation of the site: the order of pages follows ``docs/index.md``, so that a page listed there is in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["listed_pages", "navigation", "pages_of", "toml"]

Entry = str | dict[str, Any]


def listed_pages(index: str) -> dict[str, dict[str, str]]:
    """Return the pages in the tables of ``docs/index.md``: heading of the section -> path in docs/ -> title.

    Example:
        >>> listed_pages("## Guides: how\\n\\n| page | for |\\n|--|--|\\n| [Budgets](guides/budgets.md) | size |")
        {'Guides': {'guides/budgets.md': 'Budgets'}}
    """
    sections = re.split(r"^## ", index, flags=re.MULTILINE)[1:]
    rows = {
        re.split(r"[:\n]", section)[0]: {
            path: title
            for title, path in re.findall(r"^\| \[([^\]]+)\]\((\S+?\.md)\)", section, re.MULTILINE)
        }
        for section in sections
    }
    return {heading: pages for heading, pages in rows.items() if pages}


def navigation(
    listed: Mapping[str, Mapping[str, str]], notebooks: Mapping[str, str], reference: Mapping[str, str]
) -> list[Entry]:
    """Return the entries of the site's navigation.

    Args:
        listed: the pages of ``docs/index.md`` by section, as :func:`listed_pages` returns them. Each section that is
            neither "Guides" nor "Results" becomes a group below the guides.
        notebooks: path in the site -> title.
        reference: path in the site -> title.
    """
    groups = {name: _entries(pages) for name, pages in listed.items() if name not in ("Guides", "Results")}
    return [
        {
            "Start": [
                {"Home": "index.md"},
                {"Get started": "start.md"},
                {"All pages": "overview.md"},
                {"Notebooks": _entries(notebooks)},
            ]
        },
        {"Guide": [*_entries(listed.get("Guides", {})), *({name: pages} for name, pages in groups.items())]},
        {"Reference": _entries(reference)},
        {"Results": _entries(listed.get("Results", {}))},
        {"Contributing": [{"Contributing": "contributing.md"}, {"Changelog": "changelog.md"}]},
    ]


def _entries(pages: Mapping[str, str]) -> list[Entry]:
    return [{title: path} for path, title in pages.items()]


def pages_of(entries: Iterable[Entry]) -> list[str]:
    """Return the paths of all pages in a navigation."""
    pages: list[str] = []
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            pages.extend([value] if isinstance(value, str) else pages_of(value))
    return pages


def toml(value: Any) -> str:
    """Write nested lists, dictionaries and strings as inline TOML.

    Example:
        >>> toml([{"Start": ["index.md"]}])
        '[{ "Start" = ["index.md"] }]'
    """
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml(key)} = {toml(each)}" for key, each in value.items()) + " }"
    return "[" + ", ".join(map(toml, value)) + "]"
