"""End a run by Ctrl-C or SIGTERM, as Slurm sends it, with what the run has so far."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lightning.pytorch.utilities import rank_zero_only

from lightning_prune.trainer.checkpoint_io import last_checkpoint
from lightning_prune.utils.terminal import say

__all__ = ["Interruption", "go_on_command", "interruptible", "interruption_in", "undisturbed"]

STOPPING = "Ctrl-C: stopping; a batch or cut that has begun is finished or undone first"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(SystemExit):
    """A run was ended by a signal; ``code`` is that of a shell: 130 after Ctrl-C, 143 after SIGTERM."""


def interruption_in(error: BaseException | None) -> Interruption | None:
    """Return the interruption that has led to an error; None if the error is of its own.

    What is interrupted may raise an error of another kind: ``torch.save`` raises RuntimeError for a file half
    written, Lightning calls ``exit(1)`` after Ctrl-C.

    Example:
        >>> interruption_in(KeyboardInterrupt()).code, interruption_in(ValueError("wrong"))
        (130, None)
    """
    if isinstance(error, Interruption):
        return error
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return Interruption(128 + signal.SIGINT)
    return None if error is None else interruption_in(error.__cause__ or error.__context__)


@rank_zero_only
def _say_stopping() -> None:
    """Print that the run is stopping, in the first process only: a terminal sends the signal to all."""
    print(file=sys.stderr)
    say(STOPPING)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise :class:`Interruption` in the block after Ctrl-C and SIGTERM, also where Lightning raises something else.

    Without this, SIGTERM ends a process at once outside of ``Trainer.fit``, and within it only after the batch.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        raise Interruption(128 + signum)

    def announced(signum: int, frame: FrameType | None) -> None:
        _say_stopping()
        signal.default_int_handler(signum, frame)

    is_main = threading.current_thread() is threading.main_thread()
    ctrl_c = signal.getsignal(signal.SIGINT)
    if is_main and ctrl_c is signal.default_int_handler:
        signal.signal(signal.SIGINT, announced)
    before = signal.signal(signal.SIGTERM, end) if is_main else None
    try:
        yield
    except Interruption:
        raise
    except BaseException as error:
        if interruption := interruption_in(error):
            raise interruption from error
        raise
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
            signal.signal(signal.SIGINT, ctrl_c or signal.SIG_DFL)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore further signals in the block, which writes what there is; a second Ctrl-C would leave half of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(signum, signal.signal(signum, signal.SIG_IGN)) for signum in SIGNALS]
    try:
        yield
    finally:
        for signum, handler in before:
            signal.signal(signum, handler or signal.SIG_DFL)


def go_on_command(overrides: Sequence[str], folder: Path, flags: Sequence[str] = ()) -> str:
    """Return the command that continues a run from the last checkpoint in its folder.

    Args:
        overrides: of the command line of the run.
        folder: of the run.
        flags: of the command line, such as ``--config-dir``.

    Example:
        >>> go_on_command(["net=fpn", "ckpt_path=old.ckpt"], Path("no_run"))
        'lightning-prune net=fpn ckpt_path=old.ckpt'
        >>> go_on_command(["net=mine"], Path("no_run"), ["--config-dir", "my nets"])
        "lightning-prune --config-dir 'my nets' net=mine"
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        overrides = [item for item in overrides if not item.startswith("ckpt_path=")]
        overrides = [*overrides, f"ckpt_path={checkpoint}"]
    return shlex.join(["lightning-prune", *flags, *overrides])
