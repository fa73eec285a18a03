"""A run of the command in two processes prints and writes as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_prune.reporting.run_folder import Summary
from tests.cli.test_main import tiny_run, write_squares

PROGRAM = "from lightning_prune.cli.main import main\nmain()\n"


@pytest.mark.timeout(300)
def test_two_processes_print_one_banner_one_line_per_epoch_and_one_table(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)  # Lightning starts the second process with it
    root = write_squares(tmp_path / "squares", 20)
    tiny = [*tiny_run(root), "data.batch_size=2", "prune.start_epoch=0"]
    processes = ["trainer.devices=2", "+trainer.strategy=ddp", f"hydra.run.dir={tmp_path / 'run'}"]
    made = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), *tiny, *processes],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert made.returncode == 0, made.stdout
    once = ("train   RITnet", "epoch 1/2", "epoch 2/2", "| parameters", "run/report.html")
    assert {part: made.stdout.count(part) for part in once} == dict.fromkeys(once, 1), made.stdout
    assert "test images on 2 processes: scores count some of them twice" in made.stdout
    assert not any(word in made.stdout for word in ("sync_dist", "DistributedSampler", "GLOBAL_RANK"))
    assert Summary.load(tmp_path / "run").status == "completed"
