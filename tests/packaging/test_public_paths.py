"""README, docs, notebooks and conf name public paths only; the public packages export what they promise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path
from pkgutil import iter_modules

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
CONF = sorted((ROOT / "conf").rglob("*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SUBPACKAGES = [
    "criteria",
    "compensation",
    "netadapt",
    "slimming",
    "distillation",
    "integrations",
    "segmentation",
    "classification",
    "data",
    "testing",
]
FACES = {
    name: import_module(name)
    for name in ["lightning_prune", *(f"lightning_prune.{part}" for part in SUBPACKAGES)]
}
DOTTED = re.compile(r"\blightning_prune(?:\.\w+)+")
FROM_IMPORT = re.compile(r"^[ \t>.]*from (lightning_prune[\w.]*) import (\([^)]*\)|[^\n#]+)", re.MULTILINE)


def text(path: Path) -> str:
    """Return a file's text; of a notebook that of its cells, without their outputs."""
    if path.suffix == ".ipynb":
        return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    return path.read_text()


def is_public(path: str) -> bool:
    """Tell whether a dotted path is a public package or a name in the ``__all__`` of one."""
    package, _, name = path.rpartition(".")
    return path in FACES or (package in FACES and name in FACES[package].__all__)


def imported(source: str) -> Iterator[str]:
    for package, names in FROM_IMPORT.findall(source):
        yield from (f"{package}.{name.split(' as ')[0].strip()}" for name in names.strip("()\n ,").split(","))


def private_paths(source: str) -> list[str]:
    paths = [*DOTTED.findall(source), *imported(source)]
    return sorted({path for path in paths if not is_public(path)})


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS, *CONF], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_for_users_name_public_paths_only(path):
    assert private_paths(text(path)) == []


@pytest.mark.parametrize("path", CONF, ids=lambda path: str(path.relative_to(ROOT)))
def test_targets_of_the_configuration_are_exported_names(path):
    targets = re.findall(r"_target_:\s*(lightning_prune\S*)", text(path))
    assert [target for target in targets if target in FACES or not is_public(target)] == []


def test_the_check_finds_private_paths():
    source = """
from lightning_prune.criteria import L2, NoSuchCriterion
from lightning_prune.netadapt.run import (
    search,
)
_target_: lightning_prune.segmentation.module.SegmentationModule
"""
    assert private_paths(source) == [
        "lightning_prune.criteria.NoSuchCriterion",
        "lightning_prune.netadapt.run",
        "lightning_prune.netadapt.run.search",
        "lightning_prune.segmentation.module.SegmentationModule",
    ]


@pytest.mark.parametrize("package", FACES)
def test_every_exported_name_resolves(package):
    names = FACES[package].__all__
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(FACES[package], name)] == []


@pytest.mark.parametrize("package", FACES)
def test_every_exported_function_and_class_has_a_docstring_with_an_example(package):
    """The doctests run the examples; an error needs none, since its docstring says when it is raised."""
    objects = {name: getattr(FACES[package], name) for name in FACES[package].__all__}
    objects = {name: each for name, each in objects.items() if isfunction(each) or isclass(each)}
    assert [name for name, each in objects.items() if not each.__doc__] == []
    regular = {name: each for name, each in objects.items() if not name.endswith("Error")}
    assert [name for name, each in regular.items() if ">>> " not in each.__doc__] == []


@pytest.mark.parametrize("package", FACES)
def test_no_exported_function_is_named_like_a_module_of_its_package(package):
    face = FACES[package]
    modules = {module.name for module in iter_modules(getattr(face, "__path__", ()))}
    assert [name for name in face.__all__ if name in modules and isfunction(getattr(face, name))] == []
