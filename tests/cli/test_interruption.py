"""Tests of runs that Ctrl-C or SIGTERM ends: what they leave, and how they go on."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch

from lightning_prune import PruningRecord
from lightning_prune.cli.interruption import Interruption, interruptible, undisturbed
from lightning_prune.reporting.run_folder import NET, Summary
from tests.cli.test_main import lightning_prune, write_squares
from tests.support.heard_signals import heard  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:budget .* not met"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended"),
]
CODES = {"SIGINT": 130, "SIGTERM": 143}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = write_squares(tmp_path_factory.mktemp("squares"))
    data = ["data=folder", f"data.root={root}", "task.num_classes=2", "task.in_channels=1"]
    size = ["task.height=32", "task.width=32", "net.encoder_depth=3", "net.decoder_channels=[32,16,8]"]
    quick = ["trainer=fast_dev", "threads=1", "latency_runs=0", "logger=none", "trainer.max_epochs=3"]
    return [*data, *size, *quick, "prune.start_epoch=0", "prune.amount={macs:0.15}"]


@pytest.fixture(scope="module")
def whole(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    lightning_prune(*small_run, f"hydra.run.dir={folder}")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / NET, weights_only=True)["state_dict"]


def interrupted(overrides: list[str], folder: Path, name: str, epoch: int | None) -> int:
    target = "tests.support.signals.SignalAt"
    stop = f"+callbacks.stop={{_target_:{target},name:{name},epoch:{'null' if epoch is None else epoch}}}"
    with pytest.raises(SystemExit) as ended:
        lightning_prune(*overrides, stop, f"hydra.run.dir={folder}")
    return ended.value.code


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_an_interrupted_run_leaves_what_it_has_and_goes_on_to_the_same_bits(
    name: str, small_run: list[str], whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert interrupted(small_run, tmp_path / "first", name, 1) == CODES[name]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    left = {path.relative_to(tmp_path / "first").as_posix() for path in (tmp_path / "first").rglob("*")}
    assert {"checkpoints/last.ckpt", "summary.json", "record.json", "net.pt", "report.png"} <= left
    summary = Summary.load(tmp_path / "first")
    assert (summary.status, summary.epochs, summary.test) == ("interrupted", 1, {})
    assert len(summary.cuts) == 1
    assert summary.final is not None
    assert summary.final.macs < summary.dense.macs
    assert PruningRecord.load(tmp_path / "first" / "record.json")
    sentence = next(line for line in capfd.readouterr().err.splitlines() if "to go on:" in line)
    command = shlex.split(sentence.partition("to go on: ")[2])
    assert command[0] == "lightning-prune"
    assert command[-1] == f"ckpt_path={tmp_path / 'first' / 'checkpoints' / 'last.ckpt'}"
    lightning_prune(
        *(part for part in command[1:] if "SignalAt" not in part), f"hydra.run.dir={tmp_path / 'on'}"
    )
    assert Summary.load(tmp_path / "on").status == "completed"
    expected = weights(whole)
    assert weights(tmp_path / "on").keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in weights(tmp_path / "on").items())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_an_interrupted_run_in_another_precision_leaves_its_network_and_its_sizes(
    precision: str, small_run: list[str], tmp_path: Path
) -> None:
    assert interrupted([*small_run, f"trainer.precision={precision}"], tmp_path, "SIGTERM", 1) == 143
    summary, net_weights = Summary.load(tmp_path), weights(tmp_path)
    assert (summary.status, len(summary.cuts)) == ("interrupted", 1)
    assert summary.final is not None
    assert summary.final.macs < summary.dense.macs
    assert summary.final.bytes < summary.dense.bytes
    expected = {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {value.dtype for value in net_weights.values() if value.is_floating_point()} == {expected}


def test_a_run_that_is_interrupted_in_its_test_leaves_the_trained_network(
    small_run: list[str], whole: Path, tmp_path: Path
) -> None:
    assert interrupted(small_run, tmp_path / "run", "SIGTERM", None) == 143
    summary = Summary.load(tmp_path / "run")
    assert (summary.status, summary.epochs) == ("interrupted", 3)
    assert all(torch.equal(value, weights(tmp_path / "run")[key]) for key, value in weights(whole).items())


def test_signals_outside_of_training_raise_and_are_ignored_while_results_are_written() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with undisturbed():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(Interruption) as ended, interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    with pytest.raises(Interruption) as ended, interruptible():
        sys.exit(1)  # what Lightning makes of Ctrl-C
    assert ended.value.code == 130
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_is_answered_at_once_with_what_happens_next(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interruption), interruptible():
        signal.raise_signal(signal.SIGINT)
    assert (
        "Ctrl-C: stopping; a batch or cut that has begun is finished or undone first"
        in capsys.readouterr().err
    )
    assert signal.getsignal(signal.SIGINT) == before
