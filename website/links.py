"""Relative links of a page, rewritten from the places in the repository to those in the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping

__all__ = ["relinked"]

_FENCED = re.compile(r"(^```.*?^```)", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def relinked(text: str, source: str, target: str, targets: Mapping[str, str]) -> str:
    """Return the page with links that hold where it lies in the site.

    Args:
        text: the Markdown; what stands in fenced code stays.
        source: path of the page in the repository.
        target: its path in the site.
        targets: path in the repository -> path in the site, of all files of the site. A link to another place of the
            repository becomes its plain text.

    Example:
        >>> relinked("[start](../README.md#use)", "docs/index.md", "guide.md", {"README.md": "start.md"})
        '[start](start.md#use)'
    """

    def rewritten(match: re.Match[str]) -> str:
        mark, label, link = match.groups()
        path, _, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", link):
            return match.group()
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if place not in targets:
            return label
        path = posixpath.relpath(targets[place], posixpath.dirname(target) or ".")
        return f"{mark}[{label}]({path}{'#' + anchor if anchor else ''})"

    parts = _FENCED.split(text)
    parts[::2] = [_LINK.sub(rewritten, prose) for prose in parts[::2]]
    return "".join(parts)
