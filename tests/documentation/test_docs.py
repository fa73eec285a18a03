"""The code in README, docs and notebooks runs; commands compose; links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import lightning as L
import nbformat
import pytest
from hydra import compose, initialize_config_dir
from nbclient import NotebookClient

from lightning_prune import PruningRecord
from lightning_prune.cli.commands import COMMANDS
from lightning_prune.cli.config import conf_dir
from lightning_prune.cli.main import main
from lightning_prune.compensation import CompensationSettings
from lightning_prune.serialization.export import exported_record
from lightning_prune.tracing.rules import RULES

ROOT = Path(__file__).parents[2]
MARKDOWN = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGES = [str(path.relative_to(ROOT)) for path in MARKDOWN]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHECKPOINTS = "docs/guides/checkpoints.md"
ENGINE = "docs/concepts/engine.md"
LONG = ["README.md", "docs/guides/distillation.md"]  # five and more cuts of a U-Net with 14 M parameters
FOR_NEWCOMERS = ["README.md", "docs/guides/command_line.md", "docs/results/quality.md"]
OTHERS = [
    f"docs/guides/{name}.md" for name in ("budgets", "distillation", "netadapt", "sensitivity", "slimming")
]
HANGING = 3600  # seconds; far above what a notebook cell takes on a loaded machine
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .* does not have many workers",
    "ignore:.*GPU available",
    "ignore:the teacher is worse than its student",  # with two batches per epoch
    "ignore:.*exists and is not empty",
)
QUICK = {"limit_train_batches": 2, "limit_val_batches": 1, "logger": False, "enable_checkpointing": False}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def commands(page: str) -> list[str]:
    """Return the page's commands that start a training; those with their own parser are left out."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", "").splitlines()
    found = [line.split("#")[0].strip() for line in lines if line.startswith("lightning-prune")]
    return [
        command for command in found if command.split()[1:2] not in [[name] for name in (*COMMANDS, "--help")]
    ]


def overrides(command: str) -> list[str]:
    """Return the overrides of a command; of a sweep the first value of each key."""
    words = [word for word in shlex.split(command)[1:] if word != "-m"]
    return [re.sub(r"=([^,\[\]{}]*),.*", r"=\1", word) for word in words]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if page in LONG:  # layers of the repair are fitted to fewer positions
        monkeypatch.setattr(CompensationSettings, "num_positions", lambda settings, width: 64)
    quick = {**QUICK, "enable_checkpointing": page == CHECKPOINTS}
    monkeypatch.setattr(L, "Trainer", partial(L.Trainer, enable_progress_bar=False, **quick))
    scope: dict[str, object] = {}
    with patch.dict(RULES):
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), scope)
    shown = capsys.readouterr().out
    if page == "README.md":
        assert PruningRecord.load("record.json").kept
    if page == ENGINE:
        assert scope["plan"].reached
        assert scope["record"].kept
    if page == CHECKPOINTS:
        assert [cut.epoch for cut in scope["pruning"].history] == [1, 2]
        assert scope["difference"] < 1e-4
        assert exported_record("small.onnx") == scope["pruning"].record
    for expected in blocks(page, "text"):
        assert expected in shown


def test_pages_with_code_are_found():
    guides = ["budgets", "checkpoints", "criteria", "distillation", "netadapt", "schedules", "sensitivity"]
    guides += ["slimming", "training"]
    pages = {"README.md", ENGINE, *(f"docs/guides/{name}.md" for name in guides)}
    assert pages <= {page for page in PAGES if blocks(page, "python")}


def test_the_readme_and_the_page_on_the_command_line_have_commands():
    assert len(commands("README.md") + commands("docs/guides/command_line.md")) >= 7


@pytest.mark.parametrize("command", [command for page in FOR_NEWCOMERS for command in commands(page)])
def test_commands_for_newcomers_compose(command, tmp_path, monkeypatch, capsys):
    """Print the configuration in this process; `test_wheel.py` runs the installed program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-prune", *overrides(command), "--cfg", "job"])
    main()
    classifies = any(word in command for word in ("data=fashion_mnist", "data=cifar10", "experiment=cifar10"))
    kind = "classification.ClassificationModule" if classifies else "segmentation.SegmentationModule"
    assert f"lightning_prune.{kind}" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands(CHECKPOINTS))
def test_commands_of_the_page_on_checkpoints_compose(command):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=command.split()[1:])
    assert config.callbacks or config.ckpt_path


@pytest.mark.parametrize("command", commands("docs/guides/criteria.md"))
def test_commands_of_the_page_on_criteria_compose(command):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=command.split()[1:])
    assert config.prune.criterion._target_ != "lightning_prune.criteria.IPAD"


@pytest.mark.parametrize("command", commands("docs/guides/eye.md"))
def test_commands_of_the_page_on_eye_data_compose(command):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=command.split()[1:])
    assert config.data.get("root", "BrainSlices") in ("MOBIUS", "SBVPI", "BrainSlices")
    assert config.task.num_classes == len(config.task.class_names)


@pytest.mark.parametrize(
    "command", [command for page in OTHERS for command in commands(page) if "$" not in command]
)
def test_commands_of_the_other_guides_compose(command):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=overrides(command), return_hydra_config=True)
    assert config.module._target_ == "lightning_prune.segmentation.SegmentationModule"


@pytest.mark.parametrize("target", ["demo", "test"])
def test_targets_of_the_readme_exist(target):
    assert f"make {target}" in "".join(blocks("README.md", "bash"))
    plan = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert plan.returncode == 0, plan.stderr


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield file and anchor of each relative link outside of code blocks."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            yield (page.parent / file if file else page), anchor


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page):
    for file, anchor in links(ROOT / page):
        assert file.exists(), f"{page} links to {file}"
        assert not anchor or anchor in anchors(file), f"{page} links to {file}#{anchor}"


def test_the_index_lists_every_page():
    linked = {file.resolve() for file, _ in links(ROOT / "docs" / "index.md")}
    pages = {path for path in MARKDOWN if path.is_relative_to(ROOT / "docs")} - {ROOT / "docs" / "index.md"}
    assert pages <= linked


def pictures(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS])
def test_the_notebooks_run_from_top_to_bottom(name, tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    stored = len(pictures(notebook))
    NotebookClient(notebook, timeout=HANGING, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert len(pictures(notebook)) == stored > 0


@pytest.mark.parametrize("name", [path.name for path in NOTEBOOKS])
def test_the_stored_outputs_of_notebooks_are_small_and_without_warnings(name):
    file = ROOT / "notebooks" / name
    assert file.stat().st_size < 250_000
    outputs = [o for cell in nbformat.read(file, as_version=4).cells for o in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "Warning" not in printed
    assert "site-packages" not in printed


def test_the_index_lists_every_notebook():
    linked = {file.resolve() for file, _ in links(ROOT / "docs" / "index.md")}
    assert set(NOTEBOOKS) <= linked
