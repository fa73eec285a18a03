"""The command line of ``train`` before Hydra reads it: its overrides, its folders, and what it asks for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TrainArguments"]

#: flags with which Hydra prints something and runs nothing, or composes from other folders
QUESTIONS = ("--help", "-h", "--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc")
OTHER_CONFIG = ("--config-path", "-cp", "--experimental-rerun")
#: Hydra's flags with a value, besides those that are read here
VALUES = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--experimental-rerun")


@dataclass(frozen=True)
class TrainArguments:
    """The arguments of a command line that starts a training or a sweep.

    Attributes:
        overrides: ``KEY=VALUE``, ``GROUP=OPTION`` and the like.
        config_dir: folder with configurations of one's own, or None.
        config_name: the configuration to compose.
        sweeps: whether it starts a sweep (``-m``).
        prints: whether Hydra only prints the configuration: its files and values need not be there yet.
        asks: whether Hydra only prints help or facts, or runs a configuration from elsewhere: nothing to check.

    Example:
        >>> TrainArguments.parse(["-m", "net=fpn", "seed=1,2", "--config-dir", "mine"]).overrides
        ['net=fpn', 'seed=1,2']
    """

    overrides: list[str]
    config_dir: Path | None = None
    config_name: str = "config"
    sweeps: bool = False
    asks: bool = False
    prints: bool = False

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> TrainArguments:
        """Read the arguments; Hydra's other flags are passed over."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config-dir", "-cd", type=Path)
        parser.add_argument("--config-name", "-cn", default="config")
        parser.add_argument("--multirun", "-m", action="store_true")
        for flag in VALUES:
            parser.add_argument(flag, dest="others", nargs=1)
        options, rest = parser.parse_known_args(list(arguments))
        asks = any(word.split("=")[0] in (*QUESTIONS, *OTHER_CONFIG) for word in arguments)
        overrides = [word for word in rest if not word.startswith("-")]
        prints = any(word.split("=")[0] in ("--cfg", "-c") for word in arguments)
        return cls(overrides, options.config_dir, options.config_name, options.multirun, asks, prints)
