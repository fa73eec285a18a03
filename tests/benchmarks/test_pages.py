"""The pages in docs/results are what their generators write, and the commands that they name exist."""

from __future__ import annotations

import importlib
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.common.pages import RESULTS, ReportFiles
from benchmarks.common.parts import first_line, run_part

pytest.importorskip("torch_pruning")
pytest.importorskip("timm")

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "zoo": ("benchmarks.zoo.__main__", "--results"),
    "zoo_more": ("benchmarks.zoo.more", "--folder"),
    "quality": ("benchmarks.quality.__main__", "--folder"),
    "methods": ("benchmarks.methods.__main__", "--folder"),
    "distillation": ("benchmarks.distillation.__main__", "--folder"),
    "one_cut": ("benchmarks.quality.one_cut.__main__", "--folder"),
    "depth": ("benchmarks.depth.__main__", "--folder"),
    "latency": ("benchmarks.latency.__main__", None),
    "kill": ("benchmarks.robustness.kill", None),
    "interruptions": ("benchmarks.robustness.interruptions", None),
    "distributed": ("benchmarks.robustness.distributed", None),
    "fuzz": ("benchmarks.robustness.fuzz.__main__", None),
    "speed": ("benchmarks.speed.__main__", "--folder"),
    "scaling": ("benchmarks.speed.scaling", None),
    "overhead": ("benchmarks.speed.overhead", None),
    "training_cost": ("benchmarks.speed.training", None),
    "gpu": ("benchmarks.gpu.__main__", None),
}
COMMANDS = {
    name: command for name, command in COMMANDS.items() if name != "gpu" or ReportFiles(name).data.is_file()
}


@pytest.mark.parametrize("name", COMMANDS)
def test_report_writes_the_page_of_the_repository_from_its_json(name: str, tmp_path: Path):
    module, runs_option = COMMANDS[name]
    copied = ReportFiles(name, tmp_path / "results")
    copied.data.parent.mkdir(parents=True)
    shutil.copy(ReportFiles(name).data, copied.data)
    shutil.copy(ReportFiles(name).page, copied.page)
    no_runs = [runs_option, str(tmp_path / "no runs")] if runs_option else []
    importlib.import_module(module).main(["--report", "--docs", str(copied.folder), *no_runs])
    assert copied.page.read_text() == ReportFiles(name).page.read_text()
    assert copied.data.read_text() == ReportFiles(name).data.read_text()


def test_commands_in_pages_and_docstrings_exist():
    files = [*RESULTS.parent.rglob("*.md"), ROOT / "README.md", *(ROOT / "benchmarks").rglob("*.py")]
    named = {
        name for file in files for name in re.findall(r"python -m (benchmarks[\w.]*\w)", file.read_text())
    }
    assert len(named) > 12
    for name in named - {"benchmarks"}:
        spec = find_spec(name)
        assert spec is not None, name
        assert spec.submodule_search_locations is None or find_spec(f"{name}.__main__"), name


def test_report_without_results_says_what_to_do(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"scaling\.json does not exist\. Run without --report first"):
        ReportFiles("scaling", tmp_path).load()


def test_a_package_of_parts_lists_them(capsys: pytest.CaptureFixture[str]):
    run_part("speed", ["tracing"], [])
    text = capsys.readouterr().out
    assert first_line(ROOT / "benchmarks/speed/__init__.py") in text
    assert first_line(ROOT / "benchmarks/speed/tracing.py") in text
