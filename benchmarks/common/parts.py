"""The command of a package with several parts: list them, or run one."""

from __future__ import annotations

import argparse
import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["run_part"]

BENCHMARKS = Path(__file__).parents[1]


def run_part(package: str, parts: Sequence[str], arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m benchmarks.<package> PART [OPTIONS]``; without a part, print the list of parts.

    Args:
        package: name of the package below ``benchmarks``.
        parts: names of its modules that are commands.
        arguments: command line; None: that of the process.
    """
    lines = [f"  {part:14}{first_line(BENCHMARKS / package / f'{part}.py')}" for part in parts]
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{package}",
        description=first_line(BENCHMARKS / package / "__init__.py"),
        epilog="\n".join(["parts:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", nargs="?", choices=parts, metavar="PART", help="the part to run, see below")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="options of the part")
    args = parser.parse_args(arguments)
    if args.part is None:
        parser.print_help()
        return
    sys.argv[1:] = args.options
    runpy.run_module(f"benchmarks.{package}.{args.part}", run_name="__main__", alter_sys=True)


def first_line(module: Path) -> str:
    """Return the first line of a module's docstring without importing the module."""
    return (ast.get_docstring(ast.parse(module.read_text())) or "").split("\n")[0]
