"""Curves in Visdom, live: one window per metric (level 5). Needs the extra ``visdom``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

__all__ = ["VisdomLogger"]


class VisdomLogger(Logger):
    """Sends what is logged to a Visdom server; metrics that are logged once per epoch run over the epochs.

    Training does not depend on the server: if there is none, or if it goes away, a warning says how to start one,
    nothing more is sent, and training goes on.

    Args:
        server: address without the port.
        port: of the server.
        env: the environment, Visdom's word for a page of windows.
        offline: never connect.

    Raises:
        ImportError: Visdom is not installed.

    Example:
        >>> logger = VisdomLogger(env="unet", offline=True)
        >>> logger.log_metrics({"epoch": 0, "train/loss": 0.5}, step=9)  # goes nowhere
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
        """The environment."""
        return self.env

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``visdom.Visdom`` client; None without a server."""
        if self._client is None and not self.offline:
            self._client = self._connected()
        return self._client

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a point to the window of each metric."""
        values = {name: float(value) for name, value in metrics.items()}
        epoch = values.pop("epoch", None)
        by_epoch = epoch is not None and not any(name.endswith("_step") for name in values)
        x, label = (epoch, "epoch") if by_epoch else (step, "step")
        for name, value in values.items():
            self._line(name, 0.0 if x is None else float(x), value, label)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """They are in the configuration."""

    def _line(self, name: str, x: float, y: float, label: str) -> None:
        if (client := self.experiment) is None:
            return
        options = {"title": name, "xlabel": label}
        try:
            client.line([y], [x], win=name, env=self.env, update="append", opts=options)
        except Exception as error:  # the client passes on whatever its libraries raise
            self._give_up(type(error).__name__)

    def _connected(self) -> Any:
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
            self._give_up(type(error).__name__)
            return None

    def _give_up(self, why: str) -> None:
        self._client, self.offline = None, True
        rank_zero_warn(
            f"no Visdom server answers at {self.server}:{self.port} ({why}); training goes on without live curves. "
            f"Start one with: python -m visdom.server -port {self.port}"
        )
