"""Tests of sweeps in several processes that Ctrl-C ends, and of what their launchers need."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lightning_prune.cli.interruption import Interruption, interruptible
from lightning_prune.cli.sweep_state import SweepState
from lightning_prune.cli.sweep_stop import (
    run_in_worker,
    stop_code,
    stop_sweep,
    stopped_by_signals,
    with_absolute_folder,
)
from lightning_prune.reporting.run_folder import Summary, find_runs
from tests.cli.test_main import lightning_prune, tiny_run, write_squares
from tests.support.heard_signals import heard  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:budget .* not met"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended"),
]
PROGRAM = "import sys; sys.argv[0] = 'lightning-prune'; from lightning_prune.cli.main import main; main()"
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=ray"],
}


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Return overrides for runs with many short epochs."""
    return [*tiny_run(write_squares(tmp_path / "squares")), "report=false", "trainer.max_epochs=40"]


def started(*arguments: str) -> subprocess.Popen[str]:
    """Start the command as a terminal does: in a process group of its own, which gets Ctrl-C."""

    def before() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell without a terminal has it ignored

    environment = os.environ | {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=before,
    )


def wait_for(paths: list[Path], process: subprocess.Popen[str]) -> None:
    while not all(path.is_file() for path in paths):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "launcher", ["joblib", *(pytest.param(name, marks=pytest.mark.slow) for name in ("submitit", "ray"))]
)
def test_ctrl_c_ends_all_runs_which_then_go_on(
    launcher: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher}_launcher")
    sweep = tmp_path / "sweep"
    command = ["-m", "seed=1,2", *tiny, f"hydra.sweep.dir={sweep}"]
    process = started(*command, *LAUNCHERS[launcher])
    wait_for([sweep / number / "checkpoints" / "last.ckpt" for number in "01"], process)
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate()[0]
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert text.count("Ctrl-C: all runs end") == 1
    assert [run.status for run in find_runs([sweep]).values()] == ["interrupted"] * 2
    state = SweepState.load(sweep)
    assert state is not None
    assert state.status == "interrupted"
    assert f"to go on: {state.command(sweep)}" in text
    assert {"sweep.md", "sweep.html"} <= {path.name for path in sweep.iterdir()}
    assert stop_code(sweep) is None
    lightning_prune(*command)
    summaries = [Summary.load(sweep / number) for number in "01"]
    assert [(run.status, len(run.curves)) for run in summaries] == [("completed", 40)] * 2
    assert capsys.readouterr().out.count("goes on from") == 2


def test_a_run_that_has_not_begun_when_the_sweep_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    stop_sweep(tmp_path, 130)
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    assert run_in_worker(lambda: pytest.fail("it was made"), tmp_path, tmp_path / "0") is None
    assert not (tmp_path / "0").exists()
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.yaml").touch()  # a run was begun here before
    assert run_in_worker(lambda: pytest.fail("it was made"), tmp_path, tmp_path / "1") is None
    assert (tmp_path / "1").exists()


def test_a_stopped_sweep_and_sigterm_end_a_run_in_a_worker_but_not_the_worker(tmp_path: Path) -> None:
    ended = []

    def job(stop: bool) -> float:
        try:
            if stop:
                stop_sweep(tmp_path, 130)
            else:
                signal.raise_signal(signal.SIGTERM)
            time.sleep(60)
        except Interruption as error:
            ended.append(error.code)
            raise
        return 1.0

    before = signal.getsignal(signal.SIGTERM)
    assert run_in_worker(lambda: job(False), tmp_path, tmp_path / "0") is None
    assert stop_code(tmp_path) is None  # the other runs go on
    assert run_in_worker(lambda: job(True), tmp_path, tmp_path / "0") is None
    assert ended == [143, 143]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_exits_stops_the_whole_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_worker(lambda: sys.exit("no such metric"), tmp_path, tmp_path / "0") is None
    assert stop_code(tmp_path) == 1
    assert "no such metric" in capsys.readouterr().err


def test_workers_compose_runs_with_an_absolute_folder_of_the_sweep(tmp_path: Path) -> None:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": "a"}, "overrides": {"hydra": ["x=1"]}}})
    OmegaConf.set_readonly(config, True)
    other = with_absolute_folder(config, Path("/it's here"))
    assert other.hydra.sweep.dir == "/it's here"
    assert list(other.hydra.overrides.hydra) == ["x=1", "hydra.sweep.dir='/it\\'s here'"]
    assert config.hydra.sweep.dir == "a"


class Interrupting(io.BytesIO):
    """A file that is interrupted while it is written."""

    def write(self, data: object) -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0


def test_a_run_that_is_interrupted_while_a_checkpoint_is_written_has_not_failed() -> None:
    with pytest.raises(Interruption) as ended, interruptible():
        torch.save({"weight": torch.zeros(9)}, Interrupting())  # raises RuntimeError
    assert ended.value.code == 143


def test_where_no_thread_can_block_a_signal_ctrl_c_stays_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(signal, "pthread_sigmask")  # as on Windows
    before = signal.getsignal(signal.SIGINT)
    with stopped_by_signals(tmp_path):
        assert signal.getsignal(signal.SIGINT) is before
