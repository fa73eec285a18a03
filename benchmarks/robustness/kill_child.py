"""The process that :mod:`benchmarks.robustness.kill` kills: training that sends itself a signal."""

from __future__ import annotations

import functools
import io
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from benchmarks.robustness.kill_run import BATCHES, EPOCHS, PRUNINGS, Classifier, fit, shuffled
from lightning_prune.surgery import prune as surgery
from lightning_prune.trainer.checkpoint_io import AtomicCheckpointIO, last_checkpoint

__all__ = ["PLUGINS", "POINTS", "Kill", "at_call", "checkpointed", "child", "half_of", "save"]

POINTS = ("surgery", "writing", "validation", "anywhere")
PLUGINS = {"AtomicCheckpointIO": AtomicCheckpointIO, "Lightning's": TorchCheckpointIO}
MAX_COUNTS = {"surgery": 20, "writing": 30, "validation": EPOCHS * BATCHES, "anywhere": 0}
Send = Callable[[], None]

save = torch.save  # the original: `arm` replaces torch.save


@dataclass(frozen=True)
class Kill:
    """One kill: which run, how and when.

    Attributes:
        number: from 1.
        prune: one of ``PRUNINGS``.
        signal: name of the signal.
        plugin: one of ``PLUGINS``, which writes the checkpoints.
        point: one of ``POINTS``.
        share: from 0 to 1, which call of the point, or which time of the run.
    """

    number: int
    prune: str
    signal: str
    plugin: str
    point: str
    share: float

    @property
    def count(self) -> int:
        """Number of the call at which the run is killed; 0: at a time instead."""
        return min(1 + int(self.share * MAX_COUNTS[self.point]), MAX_COUNTS[self.point])


def at_call(owner: Any, name: str, number: int, instead: Callable[..., Any]) -> None:
    """Replace one call of a function or method.

    Args:
        owner: module or class whose attribute is replaced.
        name: of the function; a hook that ``owner`` does not define does nothing.
        number: of the call, from 1.
        instead: called with the function and the arguments of the call.
    """
    original, calls_left = getattr(owner, name, lambda *_: None), number

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls_left
        calls_left -= 1
        return instead(original, *args, **kwargs) if calls_left == 0 else original(*args, **kwargs)

    setattr(owner, name, counted)


def half_of(checkpoint: Any) -> tuple[bytes, bytes]:
    """Return the two halves of the bytes of a checkpoint."""
    buffer = io.BytesIO()
    save(checkpoint, buffer)
    content = buffer.getvalue()
    return content[: len(content) // 2], content[len(content) // 2 :]


def send_first(send: Send, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Send the signal, then go on."""
    send()
    return original(*args, **kwargs)


def write_half(send: Send, original: Any, checkpoint: Any, file: Any, *_: Any) -> None:
    """Write half of a checkpoint, send the signal, and write the rest if it is not the end."""
    if isinstance(file, (str, Path)):
        write_half_file(send, original, None, checkpoint, file)
        return
    first, second = half_of(checkpoint)
    file.write(first)
    file.flush()
    send()
    file.write(second)


def write_half_file(send: Send, original: Any, plugin: Any, checkpoint: Any, path: Any, *_: Any) -> None:
    """Leave half a file under the final name, as a move to another file system does that is interrupted."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("wb") as file:
        write_half(send, original, checkpoint, file)


def arm(point: str, count: int, signum: int, plugin: str) -> None:
    """Send this process a signal at the ``count``-th call of the function that belongs to ``point``."""
    writing: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "AtomicCheckpointIO": (torch, "save", write_half),
        "Lightning's": (TorchCheckpointIO, "save_checkpoint", write_half_file),
    }
    owner, name, instead = {
        "surgery": (surgery, "set_data", send_first),
        "writing": writing[plugin],
        "validation": (Classifier, "validation_step", send_first),
    }[point]
    at_call(owner, name, count, partial(instead, partial(os.kill, os.getpid(), signum)))


def checkpointed(folder: Path, prune: str = "filters", plugin: str = "AtomicCheckpointIO") -> dict[str, Any]:
    """Train with checkpoints in ``folder``, from the last complete one if there is one; return the final state."""
    checkpoints = [
        ModelCheckpoint(folder / "steps", every_n_train_steps=2),
        ModelCheckpoint(folder / "validated", save_on_train_epoch_end=False),
        ModelCheckpoint(folder / "epochs", save_on_train_epoch_end=True, every_n_epochs=2),
    ]
    callbacks, resume = [*PRUNINGS[prune](), *checkpoints], last_checkpoint(folder)
    arguments = {"max_epochs": EPOCHS, "default_root_dir": folder}
    return fit(Classifier(), shuffled(), callbacks, resume, plugin=PLUGINS[plugin](), **arguments)


def child(folder: Path, kill: Kill | None, prune: str, plugin: str, started: Any) -> None:
    """Train, and die at the moment of ``kill``, or write the final state."""
    warnings.simplefilter("ignore")
    # A shell has commands in the background ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if kill is not None and kill.count:
        arm(kill.point, kill.count, signal.Signals[kill.signal], plugin)
    started.set()
    save(checkpointed(folder, prune, plugin), folder / "final.pt")
