"""``lightning-prune prune``: prune the trained network of a run, in one cut or in rounds, and train it further."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_prune.cli.arguments import TrainArguments
from lightning_prune.cli.config import EXPECTED_ERRORS, load_config, root_cause
from lightning_prune.cli.parsers import read
from lightning_prune.cli.preflight import check_values, composed
from lightning_prune.reporting.run_folder import NET, RECORD, Summary
from lightning_prune.serialization.record import PruningRecord

__all__ = ["main", "prune_run", "pruned_config"]

FROZEN_EPOCH = {"_target_": "lightning_prune.callbacks.frozen_epoch.FrozenEpoch"}


def pruned_config(
    run: Path, out: Path, method: str, epochs: int, overrides: Sequence[str] = ()
) -> DictConfig:
    """Return the configuration of a finished run, changed to prune its network at the end of a first, frozen epoch.

    Args:
        run: folder of the finished run.
        out: folder of the new run.
        method: option of the group ``prune``.
        epochs: number of epochs to train the pruned network; 0: not at all.
        overrides: of the group ``prune``: ``prune.budget.macs=0.3 prune/criterion=taylor_gate``.

    Raises:
        ValueError: ``epochs`` is negative, an override is of another group, ``run`` is pruned already, or ``out`` is
            the same folder.
        FileNotFoundError: ``run`` holds no run.
    """
    if epochs < 0:
        raise ValueError(f"need 0 epochs or more of training after the cut, got {epochs}")
    config = load_config(run)
    _check(run, out, overrides)
    if config.scheduler and config.scheduler.get("T_max") == config.trainer.max_epochs:
        # The decay lasted for the whole run; the saved configuration has the number instead of the reference.
        config.scheduler.T_max = epochs + 1
    config.prune = _prune_group(config, out, method, overrides)
    config.trainer.max_epochs = epochs + 1
    config.callbacks = {"frozen_epoch": FROZEN_EPOCH, **config.callbacks}
    config.ckpt_path, config.latency_runs = None, 0
    for group in ("logger", "callbacks"):
        config[group] = _redirect(OmegaConf.to_container(config[group]), _run_folders(config, run), out)
    return config


def _prune_group(config: DictConfig, out: Path, method: str, overrides: Sequence[str]) -> Any:
    folder = [f"prune.folder={out / 'netadapt'}"] if method == "netadapt" else []
    all_overrides = [f"prune={method}", f"seed={config.seed}", "prune.start_epoch=0", *folder, *overrides]
    changed = composed(TrainArguments(all_overrides))
    check_values(changed, "prune")
    return OmegaConf.to_container(changed.prune, resolve=True)


def _check(run: Path, out: Path, overrides: Sequence[str]) -> None:
    """Raise ValueError for overrides that would be ignored, and for folders that must not be used."""
    for override in overrides:
        if not override.lstrip("+~").startswith(("prune.", "prune/")):
            raise ValueError(
                f"{override!r} is neither prune.KEY=VALUE nor prune/GROUP=OPTION: all other keys are those of {run}, "
                "and --epochs sets how long to train"
            )
    if out.resolve() == run.resolve():
        raise ValueError(f"{out} is the folder of the run itself: give another folder to write")
    if (run / RECORD).is_file() and PruningRecord.load(run / RECORD):
        raise ValueError(f"{run} is pruned already: give the run of the dense network (prune=none)")


def _run_folders(config: DictConfig, run: Path) -> list[str]:
    """Return the folders under which loggers and callbacks of ``run`` write: where it was trained and where it is."""
    loggers, callbacks = config.logger.values(), config.callbacks.values()
    folders = [str(logger.save_dir) for logger in loggers if logger.get("save_dir")]
    folders += [
        str(Path(callback[key]).parent)
        for callback in callbacks
        for key in ("dirpath", "path")
        if callback.get(key)
    ]
    return [*folders, str(run), str(run.absolute())]


def _redirect(node: Any, folders: Sequence[str], out: Path) -> Any:
    """Return a part of a configuration with ``out`` instead of ``folders``, so that the old run is not written to."""
    if isinstance(node, dict):
        return {key: _redirect(value, folders, out) for key, value in node.items()}
    if isinstance(node, str):
        parent = next((folder for folder in folders if Path(node).is_relative_to(folder)), None)
        return node if parent is None else str(out / Path(node).relative_to(parent))
    return node


def prune_run(run: Path, out: Path, method: str, epochs: int, overrides: Sequence[str] = ()) -> Summary:
    """Load the network of ``run``, prune it, and train it for ``epochs``; write ``out`` as a run of its own.

    The arguments are those of :func:`pruned_config`.
    """
    from lightning_prune.cli.train import run as train

    config = pruned_config(run, out, method, epochs, overrides)
    settings = {"weights": str(run / NET), "prune": method}
    return train(config, out, settings, {"prune": method}, weights=run / NET)


def main(command: str, arguments: Sequence[str]) -> None:
    """Run ``prune``, ``oneshot`` or ``netadapt`` with the arguments of its command line; ``--help`` lists them."""
    options = read(command, arguments)
    method = getattr(options, "method", command)
    from lightning_prune.cli.interruption import Interruption
    from lightning_prune.reporting.figure import show_run

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        summary = prune_run(options.run, options.out, method, options.epochs, options.overrides)
    except Interruption:
        again = " and continues with the round that was interrupted" if method == "netadapt" else ""
        print(f"interrupted; the same command starts again{again}", file=sys.stderr, flush=True)
        raise
    except EXPECTED_ERRORS as error:
        raise SystemExit(f"lightning-prune {command}: {root_cause(error)}") from error
    show_run(summary, options.out)
