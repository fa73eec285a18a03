"""Logger that draws live curves in Visdom, one window per metric. Needs the extra ``visdom``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

__all__ = ["VisdomLogger"]


class VisdomLogger(Logger):
    """Logger that sends metrics to a Visdom server.

    Metrics that are logged once per epoch are drawn over the epochs, others over the steps. Training does not depend
    on the server: if the connection fails, the logger warns once, explains how to start a server, and sends nothing
    more.

    Args:
        server: address without the port.
        port: port of the server.
        env: the environment, Visdom's word for a page of windows.
        offline: never connect.

    Raises:
        ImportError: Visdom is not installed.

    Example:
        >>> logger = VisdomLogger(env="unet", offline=True)
        >>> logger.log_metrics({"epoch": 0, "train/loss": 0.5}, step=9)
        >>> logger.name
        'unet'
    """

    def __init__(
        self,
        server: str = "http://localhost",
        port: int = 8097,
        env: str = "lightning-prune",
        offline: bool = False,
    ) -> None:
        super().__init__()
        self.server, self.port, self.env, self.offline = server, port, env, offline
        self._client: Any = None

    @property
    def name(self) -> str:
        """Return the environment."""
        return self.env

    @property
    def version(self) -> str:
        """Return an empty version; Lightning requires one."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the ``visdom.Visdom`` client; None without a server."""
        if self._client is None and not self.offline:
            self._client = self._connect()
        return self._client

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one point to the window of each metric."""
        values = {name: float(value) for name, value in metrics.items()}
        epoch = values.pop("epoch", None)
        by_epoch = epoch is not None and not any(name.endswith("_step") for name in values)
        x, label = (epoch, "epoch") if by_epoch else (step, "step")
        for name, value in values.items():
            self._append(name, 0.0 if x is None else float(x), value, label)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters: the run's configuration file has them."""

    def _append(self, name: str, x: float, y: float, label: str) -> None:
        if (client := self.experiment) is None:
            return
        options = {"title": name, "xlabel": label}
        try:
            client.line([y], [x], win=name, env=self.env, update="append", opts=options)
        except Exception as error:  # the client does not catch the errors of its libraries
            self._go_offline(type(error).__name__)

    def _connect(self) -> Any:
        """Return a client; None, after a warning, if no server answers."""
        try:
            from visdom import Visdom
        except ImportError as error:
            raise ImportError(
                "VisdomLogger needs Visdom; if `pip install visdom` fails to build: "
                "echo 'setuptools<80' > c.txt; PIP_CONSTRAINT=c.txt pip install visdom"
            ) from error
        try:
            return Visdom(
                self.server, port=self.port, env=self.env, raise_exceptions=True, use_incoming_socket=False
            )
        except ConnectionError as error:
            self._go_offline(type(error).__name__)
            return None

    def _go_offline(self, reason: str) -> None:
        """Send nothing more, and warn."""
        self._client, self.offline = None, True
        rank_zero_warn(
            f"no Visdom server answers at {self.server}:{self.port} ({reason}); training continues without live "
            f"curves. Start one with: python -m visdom.server -port {self.port}"
        )
