"""Logger of Trackio, Hugging Face's tracker, which keeps runs in a local database. Needs the extra ``trackio``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

__all__ = ["TrackioLogger"]


class TrackioLogger(Logger):
    """Logger that writes metrics into Trackio's database; ``trackio show`` opens its page.

    The run begins with its first metrics. It is open until :meth:`close` or the end of the process, since a trainer
    tests after it has told its loggers that training is over.

    Args:
        project: to which the run belongs.
        name: of the run; None: Trackio makes one up.
        space_id: of a Space of Hugging Face that gets the metrics as well; None: they stay on this machine, in
            ``~/.cache/huggingface/trackio`` or the folder ``TRACKIO_DIR`` of the environment.

    Raises:
        ImportError: Trackio is not installed; when the first metrics come.

    Example:
        >>> logger = TrackioLogger("eyes", name="half")
        >>> logger.name, logger.version
        ('eyes', 'half')
    """

    def __init__(
        self, project: str = "lightning-prune", name: str | None = None, space_id: str | None = None
    ) -> None:
        super().__init__()
        self.project, self.run_name, self.space_id = project, name, space_id
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        """Return the project."""
        return self.project

    @property
    def version(self) -> str:
        """Return the name of the run; empty if Trackio makes one up."""
        return self.run_name or ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the ``trackio.Run``, which begins with the first call."""
        if self._run is None:
            self._run = _trackio().init(
                self.project, name=self.run_name, space_id=self.space_id, config=self._config
            )
        return self._run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics of one step."""
        self.experiment.log({name: float(value) for name, value in metrics.items()}, step=step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Add to the configuration of the run; what comes after its first metrics is ignored."""
        self._config |= vars(params) if isinstance(params, Namespace) else params

    @rank_zero_only
    def close(self) -> None:
        """End the run, so that the next one of the process is a run of its own."""
        if self._run is not None:
            self._run = None
            _trackio().finish()


def _trackio() -> Any:
    try:
        import trackio
    except ImportError as error:
        raise ImportError("TrackioLogger needs Trackio: pip install 'lightning-prune[trackio]'") from error
    return trackio
