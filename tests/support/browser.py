"""A real browser: the system's Chromium, headless, driven through playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

DESKTOP, PHONE = 1200, 390
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT = 60_000  # milliseconds; drawing is done within one on an idle machine


@dataclass
class Visit:
    """A page that is open, with everything that went wrong in it.

    Attributes:
        page: playwright's.
        errors: messages of the console that are warnings or errors, and exceptions.
        requests: addresses other than that of the file.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


@pytest.fixture(scope="module")  # two modules import it: one Playwright at a time
def browser() -> Iterator[Any]:
    """Start Chromium; skip where there is none."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives it, is not installed"
    )
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def opened(browser: Any, path: Path, width: int = DESKTOP, scheme: str = "light") -> Iterator[Visit]:
    """Open a page from disk, without network, and wait until its charts are drawn."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    visit = Visit(context.new_page())
    own = path.resolve().as_uri()
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    visit.page.on(
        "console", lambda line: line.type in ("error", "warning") and visit.errors.append(line.text)
    )
    visit.page.on(
        "request",
        lambda request: request.url.startswith((own, "data:")) or visit.requests.append(request.url),
    )
    visit.page.goto(own)
    visit.page.wait_for_function("document.documentElement.dataset.charts !== 'waiting'", timeout=TIMEOUT)
    yield visit
    context.close()
