"""``lightning-prune netadapt`` and ``oneshot``: prune the trained network of a run, and train on (level 5)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from lightning_prune.cli.config import EXPECTED_ERRORS, conf_dir, root_cause
from lightning_prune.reporting import run_folder as runs
from lightning_prune.reporting.run_folder import Summary
from lightning_prune.serialization.record import PruningRecord

__all__ = ["main", "prune_run", "pruned_config"]

ABOUT = {
    "netadapt": "Prune the trained network of a run in rounds of competing candidates, test it, and train on if "
    "asked to. A search that was killed goes on at its round when the command is given again.",
    "oneshot": "Prune the trained network of a run to its budget in one cut, test it, and train on if asked to.",
}
EXAMPLE = "overrides, for example: prune.budget.macs=0.3 prune.limits.layers=0.9 prune/criterion=taylor_gate"
STILL = {"_target_": "lightning_prune.callbacks.frozen_epoch.FrozenEpoch"}


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
        ValueError: a negative number of epochs, an override of another group, ``run`` is pruned already, or ``out``.
        FileNotFoundError: ``run`` is no run.
    """
    if epochs < 0:
        raise ValueError(f"need 0 epochs or more of training after the cut, got {epochs}")
    config = OmegaConf.load(run / runs.CONFIG)
    assert isinstance(config, DictConfig)
    _check(run, out, overrides)
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
    for group in ("logger", "callbacks"):
        config[group] = _moved(OmegaConf.to_container(config[group]), _folders(config, run), out)
    return config


def _check(run: Path, out: Path, overrides: Sequence[str]) -> None:
    """Raise ValueError for what would be ignored, or spoil ``run``."""
    for override in overrides:
        if not override.lstrip("+~").startswith(("prune.", "prune/")):
            raise ValueError(
                f"{override!r} is none of prune.KEY=VALUE and prune/GROUP=OPTION: all else is as in {run}, and "
                "--epochs says how long to train on"
            )
    if out.resolve() == run.resolve():
        raise ValueError(f"{out} is the run itself: give another folder to write")
    if (run / runs.RECORD).is_file() and PruningRecord.load(run / runs.RECORD):
        raise ValueError(f"{run} is pruned already: give the run of the dense network (prune=none)")


def _folders(config: DictConfig, run: Path) -> list[str]:
    """Where ``run`` is, and where it was when its configuration was written down."""
    loggers, callbacks = config.logger.values(), config.callbacks.values()
    written = [str(each.save_dir) for each in loggers if each.get("save_dir")]
    written += [
        str(Path(each[key]).parent) for each in callbacks for key in ("dirpath", "path") if each.get(key)
    ]
    return [*written, str(run), str(run.absolute())]


def _moved(held: Any, folders: Sequence[str], out: Path) -> Any:
    """The same with ``out`` in the place of ``folders``: what a run writes must not go into another one."""
    if isinstance(held, dict):
        return {key: _moved(value, folders, out) for key, value in held.items()}
    if isinstance(held, str):
        inside = next((each for each in folders if Path(held).is_relative_to(each)), None)
        return held if inside is None else str(out / Path(held).relative_to(inside))
    return held


def prune_run(run: Path, out: Path, method: str, epochs: int, overrides: Sequence[str] = ()) -> Summary:
    """Load the network of a run, prune it, train on for ``epochs``; ``out`` is a run as any other."""
    from lightning_prune.cli.train import run as train

    config = pruned_config(run, out, method, epochs, overrides)
    given = {"weights": str(run / runs.NET), "prune": method}
    return train(config, out, given, {"prune": method}, weights=run / runs.NET)


def main(method: str, arguments: Sequence[str]) -> None:
    """The command; see its ``--help``."""
    given = _parser(method).parse_intermixed_args(arguments)
    from lightning_prune.reporting.figure import show_run

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        summary = prune_run(given.run, given.out, method, given.epochs, given.overrides)
    except EXPECTED_ERRORS as error:
        raise SystemExit(f"lightning-prune {method}: {root_cause(error)}") from error
    show_run(summary, given.out)


def _parser(method: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"lightning-prune {method}", description=ABOUT[method], epilog=EXAMPLE)
    parser.add_argument("run", type=Path, help="folder of a run with a trained, dense network (prune=none)")
    parser.add_argument("out", type=Path, help="folder to write: a run as any other")
    parser.add_argument(
        "overrides", nargs="*", help=f"keys of conf/prune/{method}.yaml; all else is as in the run"
    )
    parser.add_argument(
        "--epochs", type=int, default=0, help="of training after the cut; 0: cut and test only"
    )
    return parser
