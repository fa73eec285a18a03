"""Classification from the command line, on files in CIFAR-10's format: the published protocol in one short epoch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lightning_prune.cli.main import main
from tests.support.cifar_files import write_cifar

pytestmark = [
    pytest.mark.filterwarnings("ignore:budget .* not met"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]
SHORT = [
    *("trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2"),
    *("prune.start_epoch=0", "prune.final_phase.epochs=1", "latency_runs=0", "threads=1"),
    *("data.batch_size=16", "data.num_workers=0"),
]


def lightning_prune(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-prune", *arguments])
        main()


def test_the_experiment_cifar10_resnet56(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_cifar(tmp_path / "cifar")
    out = tmp_path / "run"
    lightning_prune(
        "experiment=cifar10_resnet56", f"data.root={root}", *SHORT, f"hydra.run.dir={out}", "logger=none"
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["epochs"] == 2
    assert len(summary["cuts"]) == 1
    assert summary["dense"]["params"] == 855770
    assert 0.4 < summary["final"]["macs"] / summary["dense"]["macs"] <= 0.469
    assert 0 <= summary["test"]["accuracy"] <= 1
    assert (out / "report.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "val accuracy" in printed
    assert "test accuracy" in printed
    assert "mIoU" not in printed


def test_missing_files_are_named_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no .*data_batch_1: give as root"):
        lightning_prune(
            "experiment=cifar10_resnet56",
            f"data.root={tmp_path}",
            *SHORT,
            f"hydra.run.dir={tmp_path / 'run'}",
        )
