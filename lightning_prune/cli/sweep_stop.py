"""Stop a sweep whose runs are in other processes, so that each run writes what it has.

Ctrl-C in a terminal goes to all processes at once; joblib then kills its workers, Ray ends with the command, and
submitit loses its jobs. Here the runs do not get the signal: the main process writes a file into the folder of the
sweep, each run sees it within a second, also on another machine, and ends as it does after SIGTERM.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, flag_override

from lightning_prune.cli.interruption import SIGNALS, Interruption
from lightning_prune.reporting.run_folder import CONFIG
from lightning_prune.utils.atomic import write_text

__all__ = ["StoppableLauncher", "in_worker", "run_in_worker", "stoppable_launchers"]

Objective = float | tuple[float, ...] | None

STOP = "stop"  # file in the folder of a sweep whose runs shall end; it holds the exit code of the command
INTERVAL = 0.5  # seconds between two checks for this file
SERIAL = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # runs in this process, which gets the signals
STOPPING = "\n{signal}: all runs end, with what they have so far; again: at once"


def stop_sweep(sweep: Path, code: int) -> None:
    """Have all runs of a sweep end, and its command with an exit code."""
    write_text(sweep / STOP, f"{code}\n")


def stop_code(sweep: Path) -> int | None:
    """Return the exit code of a sweep whose runs shall end; None if they shall go on."""
    try:
        return int((sweep / STOP).read_text())
    except FileNotFoundError:
        return None


def in_worker(config: Any) -> bool:
    """Return whether runs are in other processes than the sweep, by the node ``hydra`` of their configuration.

    Example:
        >>> in_worker(DictConfig({"launcher": {"_target_": SERIAL}}))
        False
    """
    return str(config.launcher._target_) != SERIAL


def run_in_worker(job: Callable[[], Objective], sweep: Path, folder: Path) -> Objective:
    """Make one run of a sweep in a process of its launcher, unless the sweep is stopped.

    No signal leaves the process as an exception: launchers would kill the other runs for it.

    Args:
        job: makes the run, and returns its objective.
        sweep: folder of the sweep.
        folder: of the run; it is removed if the run does not begin.

    Returns:
        The objective; None if the run was ended. SystemExit in a run stops the whole sweep.
    """
    if stop_code(sweep) is not None:
        _remove_unused(folder)
        return None
    try:
        with ended_with_sweep(sweep):
            return job()
    except Interruption:
        return None
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr, flush=True)
        stop_sweep(sweep, error.code if isinstance(error.code, int) else 1)
        return None


def _remove_unused(folder: Path) -> None:
    """Remove the folder that Hydra has made for a run, unless a run has begun in it."""
    if not (folder / CONFIG).is_file():
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ended_with_sweep(sweep: Path) -> Iterator[None]:
    """Raise :class:`Interruption` in the block when the sweep is stopped, and after SIGTERM."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise Interruption(128 + signum)

    def end_when_stopped() -> None:
        while not done.wait(INTERVAL):
            if stop_code(sweep) is not None:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    if threading.current_thread() is not threading.main_thread():
        yield  # there, signals cannot be handled
        return
    done, before = threading.Event(), signal.signal(signal.SIGTERM, end)
    watch = threading.Thread(target=end_when_stopped, name="end of the sweep", daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class StoppableLauncher(Launcher):
    """Hydra launcher around one that makes runs in other processes: ends when all of them have ended.

    Args:
        launcher: makes the runs.
        sweep: folder of the sweep.
    """

    def __init__(self, launcher: Launcher, sweep: Path) -> None:
        self.launcher, self.sweep = launcher, sweep

    def setup(self, **arguments: Any) -> None:
        """Set up the launcher within."""
        self.launcher.setup(**arguments)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Make runs.

        Raises:
            SystemExit: the sweep was stopped; its code is that of :func:`stop_sweep`.
        """
        (self.sweep / STOP).unlink(missing_ok=True)
        try:
            with stopped_by_signals(self.sweep):
                results = self.launcher.launch(job_overrides, initial_job_idx)
        except Exception:
            if stop_code(self.sweep) is None:
                raise
        if (code := stop_code(self.sweep)) is not None:
            (self.sweep / STOP).unlink()
            raise SystemExit(code)
        return results


@contextmanager
def stopped_by_signals(sweep: Path) -> Iterator[None]:
    """Stop a sweep after Ctrl-C or SIGTERM in the block; the second time, raise :class:`Interruption`.

    Processes that are started in the block do not get Ctrl-C: they inherit that it is blocked in this thread. On
    Windows, where it cannot be blocked, nothing changes.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        if stop_code(sweep) is not None:
            raise Interruption(128 + signum)
        stop_sweep(sweep, 128 + signum)
        name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
        print(STOPPING.format(signal=name), file=sys.stderr, flush=True)

    def receive() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        done.wait()

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    done = threading.Event()
    resource_tracker.ensure_running()  # this unblocks the signals
    before = [(signum, signal.signal(signum, stop)) for signum in SIGNALS]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Some thread must let the signal in. Python's handler runs in the main thread all the same.
    threading.Thread(target=receive, name="Ctrl-C", daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in before:
            signal.signal(signum, handler or signal.SIG_DFL)


@contextmanager
def stoppable_launchers() -> Iterator[None]:
    """Have Hydra put a :class:`StoppableLauncher` around launchers that make runs in other processes.

    Hydra has no hook for this. The folder of the sweep becomes absolute for them: a worker of Ray has another working
    directory.
    """
    original = Plugins.instantiate_launcher

    def instantiate(plugins: Plugins, hydra_context: Any, task_function: Any, config: DictConfig) -> Launcher:
        if not in_worker(config.hydra):
            return original(plugins, hydra_context, task_function, config)
        quieten_ray()
        sweep = Path(config.hydra.sweep.dir).resolve()
        config = with_absolute_folder(config, sweep)
        return StoppableLauncher(original(plugins, hydra_context, task_function, config), sweep)

    Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Plugins.instantiate_launcher = original  # type: ignore[method-assign]


def quieten_ray() -> None:
    """Have Ray show every line of every run, without colours where there is no terminal; before it is imported."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # it takes the epochs of two runs for repeated lines
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")


def with_absolute_folder(config: DictConfig, sweep: Path) -> DictConfig:
    """Return a copy of a configuration, and of the overrides from which runs are composed, with another folder."""
    config = copy.deepcopy(config)
    with flag_override(config, ["struct", "readonly"], [False, False]):
        config.hydra.sweep.dir = str(sweep)
        quoted = QuotedString(str(sweep), Quote.single).with_quotes()
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted}")
    return config
