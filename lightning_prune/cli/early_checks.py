"""Checks of the arguments of commands other than ``train``, before torch is imported: runs, packages, first words."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from glob import escape
from importlib.util import find_spec
from pathlib import Path

from lightning_prune.cli.config import UsageError
from lightning_prune.cli.sweep_state import STATE
from lightning_prune.utils.hints import did_you_mean

__all__ = ["check_arguments", "is_network_path", "located"]

CONFIG, NET = "config.yaml", "net.pt"  # as in run_folder, which imports torch
LAST = Path("checkpoints", "last.ckpt")  # of a run
PLACES = ("outputs", "multirun")  # folders in which Hydra puts runs and sweeps, by their day
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
NEITHER = "is neither the folder of a run, nor KEY=VALUE, nor the import path of a network"


def check_arguments(command: str, options: Namespace) -> None:
    """Raise UsageError if a command cannot run: its run is not there or not ended, or a package is not installed.

    Args:
        command: its name.
        options: its arguments, as read.
    """
    CHECKS.get(command, lambda _: None)(options)


def is_network_path(word: str) -> bool:
    """Return whether a word can be the import path of a network.

    Example:
        >>> is_network_path("torchvision.models.resnet18"), is_network_path("outputs/run"), is_network_path("resnet")
        (True, False, False)
    """
    return "." in word and "/" not in word and not Path(word).is_dir()


def located(folder: Path) -> Path:
    """Return a folder, or the one of this name under ``outputs`` or ``multirun``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    if folder.is_dir():
        return folder
    places = [path for top in PLACES for path in sorted(Path(top).glob(f"*/{escape(str(folder))}"))]
    if not places:
        hint = did_you_mean(folder.name, [path.name for top in PLACES for path in Path(top).glob("*/*")])
        sentence = f"there is no folder {folder}: give folders of runs or of sweeps"
        raise FileNotFoundError("; ".join(filter(None, [sentence, hint])))
    if len(places) > 1:
        raise ValueError(f"{folder} may be {' or '.join(map(str, places))}")
    return places[0]


def _check_run(folder: Path) -> None:
    """Raise UsageError if a folder holds no run."""
    if (folder / CONFIG).is_file():
        return
    if (folder / STATE).is_file():
        runs = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        example = f": give one of its runs, such as {runs[0]}" if runs else ""
        raise UsageError(f"{folder} is a sweep{example}")
    raise UsageError(f"{folder} holds no run: there is no {folder / CONFIG}")


def _check_ended(folder: Path, weights: Path | None = None) -> None:
    """Raise UsageError if a run, or its trained network, is not there."""
    _check_run(folder)
    source = weights or folder / NET
    if not source.is_file():
        raise UsageError(f"there is no {source}; {_unended(folder)}")


def _unended(folder: Path) -> str:
    last = folder / LAST
    go_on = f"; to go on: the command of the run, and ckpt_path={last}" if last.is_file() else ""
    return f"the run has not ended, and has no network yet{go_on}"


def _prune(options: Namespace) -> None:
    _check_ended(options.run)


def _export(options: Namespace) -> None:
    last = options.run / LAST
    if options.weights is None and not (options.run / NET).is_file() and last.is_file():
        _check_run(options.run)
        raise UsageError(f"there is no {options.run / NET}, the run has not ended: give --weights {last}")
    _check_ended(options.run, options.weights)
    if options.baseline is not None:
        _check_ended(options.baseline)
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing and (options.int8 or options.path is None or options.path.suffix != ".pt2"):
        raise UsageError(
            f"ONNX needs {', '.join(missing)}:\n  pip install 'lightning-prune[export]'\n"
            f"or write a torch.export program: lightning-prune export {options.run} net.pt2"
        )


def _plan(options: Namespace) -> None:
    first = "".join(options.words[:1])
    if not first or "=" in first or first.startswith(("~", "+")) or (Path(first) / CONFIG).is_file():
        return
    if not is_network_path(first):
        raise UsageError(f"{first!r} {NEITHER}")


def _compare(options: Namespace) -> None:
    for folder in options.runs:
        try:
            located(folder)
        except (FileNotFoundError, ValueError) as error:
            raise UsageError(str(error)) from None


def _report(options: Namespace) -> None:
    for folder in filter(None, (options.run, options.baseline)):
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}: give the folder of a run or of a sweep")


CHECKS: dict[str, Callable[[Namespace], None]] = {
    "plan": _plan,
    "prune": _prune,
    "oneshot": _prune,
    "netadapt": _prune,
    "sensitivity": _prune,
    "export": _export,
    "report": _report,
    "compare": _compare,
}
