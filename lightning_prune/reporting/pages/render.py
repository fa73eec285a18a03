"""Fill the templates of pages, and put everything that a page needs into its one file."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lightning_prune.utils.atomic import write_text

__all__ = ["NO_PLOTLY", "plotly_script", "render", "write_page"]

NO_PLOTLY = "This page has no charts, since plotly is not installed: pip install plotly, then make it again."


@lru_cache(maxsize=1)
def plotly_script() -> str:
    """Return plotly.js, compressed, as text that the page unpacks; empty if plotly is not installed.

    Compressed it has 2 MB instead of 5, in every page.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return ""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Return the templates; values are escaped, so that a name of a class or a metric is never markup."""
    environment = Environment(
        loader=PackageLoader("lightning_prune.reporting.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["chart"] = _as_script
    return environment


def _as_script(chart: Mapping[str, Any]) -> Markup:
    """Return a chart as JSON that can stand in a script element."""
    text = json.dumps(chart, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def render(template: str, **values: Any) -> str:
    """Return the HTML of a page.

    Args:
        template: name of its file.
        values: of its variables.
    """
    environment = _environment()
    parts = {name: Markup(_source(name)) for name in ("style.css", "page.js")}
    return environment.get_template(template).render(
        style=parts["style.css"],
        script=parts["page.js"],
        plotly=Markup(plotly_script()),
        no_plotly=NO_PLOTLY,
        **values,
    )


def _source(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write a page to ``path``, which keeps its content if that fails, and return the path."""
    write_text(path, render(template, **values))
    return path
