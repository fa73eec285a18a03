"""``lightning-prune netadapt`` and ``oneshot``: prune the trained network of a run, and train on (level 5)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from lightning_prune import runs
from lightning_prune.cli import EXPECTED, conf_dir, reason
from lightning_prune.runs import Summary

__all__ = ["main", "prune_run", "pruned_config"]

STILL = {"_target_": "lightning_prune.still.StillEpoch"}


def pruned_config(
    run: Path, out: Path, method: str, epochs: int, overrides: Sequence[str] = ()
) -> DictConfig:
    """The configuration of a finished run, with another way to prune, at the end of a first epoch without learning.

    Args:
        run: folder of the run.
        out: folder of the new one.
        method: option of the group ``prune``.
        epochs: to train the pruned network; 0: not at all.
        overrides: of the group ``prune``: ``prune.budget.macs=0.3 prune/criterion=taylor_gate``.

    Raises:
        ValueError: a negative number of epochs.
        FileNotFoundError: ``run`` is no run.
    """
    if epochs < 0:
        raise ValueError(f"need 0 epochs or more of training after the cut, got {epochs}")
    config = OmegaConf.load(run / runs.CONFIG)
    assert isinstance(config, DictConfig)
    folder = [f"prune.folder={out / 'netadapt'}"] if method == "netadapt" else []
    chosen = [f"prune={method}", f"seed={config.seed}", "prune.start_epoch=0", *folder, *overrides]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        prune = OmegaConf.to_container(compose("config", overrides=chosen).prune, resolve=True)
    if config.scheduler and config.scheduler.get("T_max") == config.trainer.max_epochs:
        config.scheduler.T_max = (
            epochs + 1
        )  # a decay over the whole run, of which only the number was written down
    config.prune, config.trainer.max_epochs = prune, epochs + 1
    config.callbacks = {"still": STILL, **config.callbacks}
    config.ckpt_path, config.latency_runs = None, 0
    return config


def prune_run(run: Path, out: Path, method: str, epochs: int, overrides: Sequence[str] = ()) -> Summary:
    """Load the network of a run, prune it, train on for ``epochs``; ``out`` is a run as any other."""
    from lightning_prune.experiment import run as train

    config = pruned_config(run, out, method, epochs, overrides)
    given = {"weights": str(run / runs.NET), "prune": method}
    return train(config, out, given, {"prune": method}, weights=run / runs.NET)


def main(method: str, arguments: Sequence[str]) -> None:
    """The command; see its ``--help``."""
    from lightning_prune.report import show_run

    parser = argparse.ArgumentParser(f"lightning-prune {method}", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run with a trained, dense network (prune=none)")
    parser.add_argument("out", type=Path, help="folder to write: a run as any other")
    parser.add_argument("overrides", nargs="*", help="prune.budget.macs=0.3 prune/criterion=taylor_gate ...")
    parser.add_argument(
        "--epochs", type=int, default=0, help="of training after the cut; 0: cut and test only"
    )
    given = parser.parse_intermixed_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        summary = prune_run(given.run, given.out, method, given.epochs, given.overrides)
    except EXPECTED as error:
        raise SystemExit(f"lightning-prune {method}: {reason(error)}") from error
    show_run(summary, given.out)
