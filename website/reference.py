"""A page of the reference for each public package, which mkdocstrings fills from the docstrings."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_prune

__all__ = ["exported", "identifiers", "packages", "page"]

ROOT = Path(__file__).parents[1]


def packages() -> list[str]:
    """Return the public packages, the root first."""
    return ["lightning_prune", *(f"lightning_prune.{name}" for name in lightning_prune._PACKAGES)]


def exported(package: str) -> list[str]:
    """Return the ``__all__`` of a package as its source says it, without importing torch."""
    path = ROOT / Path(*package.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{package} has no __all__")


def identifiers() -> set[str]:
    """Return packages and public names with their packages, to which docstrings can link."""
    return {*packages(), *(f"{package}.{name}" for package in packages() for name in exported(package))}


def page(package: str) -> str:
    """Return the Markdown of a package's page: mkdocstrings replaces the directive; the anchor is for links."""
    return f"# {package} {{ #{package} }}\n\n::: {package}\n"
