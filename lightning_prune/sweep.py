"""One table over many runs (level 5)."""

from hydra.experimental.callback import Callback


class SweepTable(Callback):
    """Writes and prints the table of a sweep when its last run has ended."""
