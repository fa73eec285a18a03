"""A module imports from its own level or lower ones; the engine needs neither Lightning nor Hydra."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_prune"
LEVELS = [
    "randomness ids shapes sizes letters untouched inputs schedules losses ritnet_losses distillation_losses "
    "networks",
    "calls modes recording tracker pins rules",
    "graph units tracing",
    "criteria naming limits ledger stock plans selection statistics surgery record proof replay known optimizers "
    "oracles batches resources memory cutting measure processes saving export taps teacher lessons penalty shrinking "
    "operators timing lookup onnx_pieces compiled executions latency_build latency_table folding "
    "templates correction measurements "
    "rollback shown policy facts contest trials deviation masks "
    "slimmed "
    "blocks candidates rounds search_state netadapt searching observing alignment sensitivity one_shot",
    "callback best checkpoint_io loop averages resume segmentation data runs distillation teaching scoring slimming "
    "checkpointed distillation_setup "
    "trainer_checks "
    "retraining tables heldout adapting netadapt_callback still feeding standin",
    "cli experiment export_run latency_run prune_run report sweep demo progress visdom_logger "
    "sensitivity_run __main__",
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_module_has_a_level():
    assert {part(path) for path in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    own = LEVEL[part(path)]
    ours = [name.split(".")[1] for name in imports(path) if name.startswith("lightning_prune.")]
    assert [name for name in ours if LEVEL[name] > own] == []
    if own <= 3:
        assert {name.split(".")[0] for name in imports(path)}.isdisjoint({"lightning", "hydra", "omegaconf"})
