"""Packages import from packages below them, and modules form no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lightning_prune"
# From the bottom up: a package may import from itself and from those before it.
ORDER = [
    *("utils", "tracing", "data", "graph", "serialization", "criteria", "surgery", "selection"),
    *(
        "compensation",
        "pruning",
        "latency",
        "netadapt",
        "slimming",
        "trainer",
        "callbacks",
        "integrations",
        "distillation",
        "reporting",
    ),
    *("tasks", "segmentation", "classification", "testing", "cli"),
]
WITHOUT_LIGHTNING = ORDER[: ORDER.index("slimming") + 1]
FACES = {"lightning_prune", *(f"lightning_prune.{name}" for name in ORDER)}
ENTRY_POINTS = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
FILES = sorted(set(PACKAGE.rglob("*.py")) - ENTRY_POINTS)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, at its top or within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & MODULES.keys() or {node.module}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


MODULES = {module_name(path): path for path in FILES}
IMPORTS = {module: set(imports(path)) for module, path in MODULES.items()}
INTERNAL = {module: {name for name in names if name in MODULES} for module, names in IMPORTS.items()}


def test_every_package_has_its_place_in_the_order():
    assert {package(module) for module in MODULES} == set(ORDER)


def test_imports_go_downward():
    place = {module: ORDER.index(package(module)) for module in MODULES}
    upward = [
        (module, name) for module in MODULES for name in INTERNAL[module] if place[name] > place[module]
    ]
    assert upward == []


def test_modules_import_from_the_concrete_module():
    packages = {face for face in FACES if (PACKAGE.parent / face.replace(".", "/")).is_dir()}
    assert {module: names & packages for module, names in IMPORTS.items() if names & packages} == {}


def test_the_engine_needs_neither_lightning_nor_hydra():
    engine = [module for module in MODULES if package(module) in WITHOUT_LIGHTNING]
    frameworks = {module: {"lightning", "hydra", "omegaconf"} for module in engine}
    for module in engine:
        if package(module) == "data":
            frameworks[module].remove("lightning")  # its data modules are LightningDataModules
    found = {m: {name.split(".")[0] for name in IMPORTS[m]} & frameworks[m] for m in engine}
    assert {module: names for module, names in found.items() if names} == {}


def test_no_modules_import_each_other_in_a_circle():
    order = list(TopologicalSorter(INTERNAL).static_order())  # raises CycleError, which names the circle
    assert set(order) == set(MODULES)
