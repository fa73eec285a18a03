"""What README and docs show must run."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import nbformat
import pytest
from hydra import compose, initialize_config_dir
from nbclient import NotebookClient

from lightning_prune import PruningRecord
from lightning_prune.cli.config import conf_dir

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .* does not have many workers",
    "ignore:.*GPU available",
    "ignore:the teacher is worse than its student",  # of two batches an epoch
    "ignore:.*exists and is not empty",
)
QUICK = {"limit_train_batches": 2, "limit_val_batches": 1, "logger": False, "enable_checkpointing": False}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def commands(page: str = "README.md") -> list[str]:
    lines = "".join(blocks(page, "bash")).splitlines()
    found = [line.split("#")[0].strip() for line in lines if line.startswith("lightning-prune")]
    others = ("lightning-prune export", "lightning-prune sensitivity")
    return [command for command in found if not command.startswith(others)]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/engine.md",
        "docs/checkpoints.md",
        "docs/training.md",
        "docs/schedules.md",
        "docs/sensitivity.md",
        "docs/distillation.md",
        "docs/criteria.md",
        "docs/budgets.md",
        "docs/slimming.md",
        "docs/netadapt.md",
    ],
)
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = {**QUICK, "enable_checkpointing": page == "docs/checkpoints.md"}
    monkeypatch.setattr(L, "Trainer", partial(L.Trainer, enable_progress_bar=False, **quick))
    scope: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), scope)
    shown = capsys.readouterr().out
    if page == "README.md":
        assert PruningRecord.load("record.json").kept
        assert scope["graph"].cost("macs", scope["plan"]) <= 0.4 * scope["graph"].cost("macs")
    if page == "docs/checkpoints.md":
        assert [cut.epoch for cut in scope["pruning"].history] == [1, 2]
        assert scope["apart"] < 1e-4
    for expected in blocks(page, "text"):
        assert expected in shown


def test_the_readme_has_commands():
    assert len(commands()) >= 7


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_readme_compose(command, tmp_path):
    words = [word for word in command.split()[1:] if word != "-m"]
    single = [re.sub(r"=([^,\[\]{}]*),.*", r"=\1", word) for word in words]  # the first of a sweep's values
    run = [sys.executable, "-m", "lightning_prune", *single, "--cfg", "job"]
    out = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert out.returncode == 0, out.stderr
    assert "lightning_prune.segmentation.module.SegmentationModule" in out.stdout


@pytest.mark.parametrize("command", commands("docs/checkpoints.md"))
def test_commands_of_the_page_on_checkpoints_compose(command):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=command.split()[1:])
    assert config.callbacks or config.ckpt_path


@pytest.mark.parametrize("command", commands("docs/criteria.md"))
def test_commands_of_the_page_on_criteria_compose(command):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=command.split()[1:])
    assert config.prune.criterion._target_ != "lightning_prune.criteria.IPAD"


@pytest.mark.parametrize("command", commands("docs/eye.md"))
def test_commands_of_the_page_on_eyes_compose(command):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=command.split()[1:])
    assert config.data.get("root", "BrainSlices") in ("MOBIUS", "SBVPI", "BrainSlices")
    assert config.task.num_classes == len(config.task.class_names)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_targets_of_the_readme_exist(target):
    assert f"make {target}" in "".join(blocks("README.md", "bash"))
    plan = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert plan.returncode == 0, plan.stderr


def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2
