"""What a browser would request from other hosts when it opens a page of the site."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

__all__ = ["external_requests"]

_ATTRIBUTES = {"src", "srcset", "data", "poster"}
_LOADED_LINKS = {"stylesheet", "preload", "preconnect", "dns-prefetch", "icon", "modulepreload", "manifest"}
_ELSEWHERE = re.compile(r"^(?:https?:)?//")
_IN_STYLES = re.compile(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")\s]+)")


class _Requests(HTMLParser):
    """Collect the addresses that a page loads by itself; links that a reader follows are none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note the addresses of one tag."""
        values = {name: value or "" for name, value in attributes}
        loaded = [values[name] for name in _ATTRIBUTES & set(values)]
        if tag == "link" and _LOADED_LINKS & set(values.get("rel", "").split()):
            loaded.append(values.get("href", ""))
        self.found += [address for address in loaded if _ELSEWHERE.match(address)]


def external_requests(site: Path) -> list[str]:
    """Return "page: address" for each file of another host that a page or style sheet in ``site`` loads."""
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            parser = _Requests()
            parser.feed(path.read_text(encoding="utf-8"))
            addresses = parser.found
        elif path.suffix == ".css":
            addresses = _IN_STYLES.findall(path.read_text(encoding="utf-8"))
        else:
            continue
        found += [f"{path.relative_to(site)}: {address}" for address in addresses]
    return found
