"""Build the site: ``python -m website [--out build/website]``. A broken link or a page from elsewhere is an error."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from website.navigation import toml
from website.requests import external_requests
from website.sources import HERE, ROOT, collect, entries

__all__ = ["build", "main"]


def build(out: Path) -> Path:
    """Build the site in ``out`` and return its folder.

    Raises:
        RuntimeError: the generator is missing, or found a broken link; a page requests something from elsewhere.
    """
    if importlib.util.find_spec("zensical") is None:
        raise RuntimeError(
            "the generator is not installed: `make docs`, or pip install 'lightning-prune[docs]'"
        )
    out = out.resolve()
    collect(out / "source")
    config = out / "zensical.toml"
    settings = (HERE / "zensical.toml").read_text(encoding="utf-8")
    head = f"[project]\ndocs_dir = {toml('source')}\nnav = {toml(entries())}\n"
    handler = f"[project.plugins.mkdocstrings.handlers.python]\npaths = [{toml(str(ROOT))}]\n"
    config.write_text(head + settings + handler, encoding="utf-8")
    _run(config)
    if found := external_requests(out / "site"):
        raise RuntimeError("pages request files from elsewhere:\n" + "\n".join(found))
    return out / "site"


def _run(config: Path) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", str(config)]
    result = subprocess.run(
        command,
        cwd=config.parent,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        message = re.sub(r"\x1b\[[\d;]*m", "", result.stdout)
        raise RuntimeError(message.split("Traceback")[0] if "issue" in message else message)


def main() -> None:
    """Build the site and say where it is."""
    parser = argparse.ArgumentParser(prog="python -m website", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "website", help="folder to build in")
    try:
        site = build(parser.parse_args().out)
    except RuntimeError as error:
        sys.exit(str(error))
    print(f"Open {site / 'index.html'}")


if __name__ == "__main__":
    main()
