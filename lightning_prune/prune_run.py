"""``lightning-prune netadapt`` and ``oneshot``: prune the trained network of a run, and train on (level 5)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from lightning_prune import runs
from lightning_prune.cli import EXPECTED, conf_dir, reason
from lightning_prune.runs import Summary

__all__ = ["main", "prune_run", "pruned_config"]


def pruned_config(
    run: Path, out: Path, method: str, epochs: int, overrides: Sequence[str] = ()
) -> DictConfig:
    """The configuration of a finished run, with another way to prune, at the end of its first epoch.

    Args:
        run: folder of the run.
        out: folder of the new one.
        method: option of the group ``prune``.
        epochs: to train in all.
        overrides: of the group ``prune``: ``prune.budget.macs=0.3 prune/criterion=taylor_gate``.

    Raises:
        ValueError: fewer than one epoch.
    """
    if epochs < 1:
        raise ValueError(f"need at least one epoch, at whose end the network is pruned; got {epochs}")
    config = OmegaConf.load(run / runs.CONFIG)
    assert isinstance(config, DictConfig)
    folder = [f"prune.folder={out / 'netadapt'}"] if method == "netadapt" else []
    chosen = [f"prune={method}", f"seed={config.seed}", "prune.start_epoch=0", *folder, *overrides]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        prune = OmegaConf.to_container(compose("config", overrides=chosen).prune, resolve=True)
    config.prune, config.trainer.max_epochs = prune, epochs
    config.ckpt_path, config.latency_runs = None, 0
    return config


def prune_run(run: Path, out: Path, method: str, epochs: int, overrides: Sequence[str] = ()) -> Summary:
    """Load the network of a run, train, prune at the end of the first epoch, go on; ``out`` is a run as any other."""
    from lightning_prune.experiment import run as train

    config = pruned_config(run, out, method, epochs, overrides)
    given = {"weights": str(run / runs.NET), "prune": method}
    return train(config, out, given, {"prune": method}, weights=run / runs.NET)


def main(method: str, arguments: Sequence[str]) -> None:
    """The command; see its ``--help``."""
    parser = argparse.ArgumentParser(f"lightning-prune {method}", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run with a trained, dense network (prune=none)")
    parser.add_argument("out", type=Path, help="folder to write: a run as any other")
    parser.add_argument("overrides", nargs="*", help="prune.budget.macs=0.3 prune/criterion=taylor_gate ...")
    parser.add_argument("--epochs", type=int, default=1, help="in all; the network is pruned after the first")
    given = parser.parse_args(arguments)
    try:
        summary = prune_run(given.run, given.out, method, given.epochs, given.overrides)
    except EXPECTED as error:
        raise SystemExit(f"lightning-prune {method}: {reason(error)}") from error
    scores = ", ".join(f"{name} {value:.4f}" for name, value in summary.test.items())
    print(f"{given.out}: test {scores}")
