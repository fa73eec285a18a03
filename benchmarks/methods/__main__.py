"""Compare ways of pruning: gradual, NetAdapt, slimming, one shot and random; with equal data, steps and budgets.

    python -m benchmarks.methods                     # three seeds, eight methods, three budgets
    python -m benchmarks.methods --part 1/2          # half of the runs; start --part 2/2 as a second process
    python -m benchmarks.methods --report            # only write docs/results/methods.md and its picture again

Each run is a ``lightning-prune experiment=study prune=...``: a U-Net on BrainSlices from scratch, one thread, 24
epochs of 21 steps. NetAdapt holds out a fifth of the samples to compare its candidates, and the steps of the
candidates are counted. So it trains for 27 epochs of 16 steps, which gives about the same number of steps in total.
Latency is that of one image on one thread; the dense and the pruned network are measured alternately.
Runs in ``runs*.jsonl`` are not repeated, so the command can be stopped and started again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.common.studies import Row, finished, jobs, study, study_parser
from benchmarks.methods.report import DENSE, write
from lightning_prune.cli.config import conf_dir
from lightning_prune.cli.train import run
from lightning_prune.reporting.run_folder import Summary

BUDGETS = (("macs", 0.5), ("macs", 0.26), ("latency", 0.5))  # latency as predicted by the table
GRADUAL = ["experiment=study_pruned"]  # a tenth of the MACs after each epoch from the third on
SLIMMING = ["experiment=study_slimmed"]  # until the end of the sixteenth epoch
SECONDS = ["+prune/resources=latency", "prune.resources.latency.threads=1"]
NETADAPT = ["experiment=study", "prune=netadapt", "trainer.max_epochs=27"]  # see the module's docstring
VARIANTS = {
    "IPAD, omega 1": [*GRADUAL, "prune/criterion=ipad_weights"],
    "random": [*GRADUAL, "prune/criterion=random"],
    "one shot, L2": ["experiment=study", "prune=oneshot"],
    "NetAdapt, L2": NETADAPT,
    "NetAdapt, Taylor": [*NETADAPT, "prune/criterion=taylor_weight"],
    "slimming, MACs": [*SLIMMING, "prune.by=macs"],
    "slimming, seconds": [*SLIMMING, "prune.by=latency"],
    "Taylor, gates": [*GRADUAL, "prune/criterion=taylor_gate"],
}
LIMIT = 0.85  # of a layer's parameters, in all methods
SMALL = ["data.slices_per_axis=6", "data.size=32", "trainer.max_epochs=4", "latency_runs=2"]
SMALL_NETADAPT = ["prune.start_epoch=1"]  # the default is after the fourth epoch
Job = tuple[int, tuple[str, float], str]  # seed, (resource, share), method


def configuration(job: Job, folder: Path, small: bool = False) -> DictConfig:
    """Return the configuration of one run; ``folder`` is for latency tables and states of searches."""
    options = overrides(job, folder)
    if small:
        options += [*SMALL, *(SMALL_NETADAPT if job[2].startswith("NetAdapt") else ())]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=options)


def overrides(job: Job, folder: Path) -> list[str]:
    """Return the overrides of one run."""
    seed, (resource, budget), variant = job
    options = ["logger=none", "checkpoint=none", f"seed={seed}", "latency_runs=30"]
    if variant == DENSE:
        return [*options, "experiment=study", "prune=none"]
    options += [*VARIANTS[variant], f"prune.limits.layers={LIMIT}", "~prune.budget.macs"]
    options += [f"+prune.budget.{resource}={budget}"]
    if resource == "latency" or variant.endswith("seconds"):
        options += [*SECONDS, f"prune.resources.latency.path={folder / 'latency'}"]
    if variant.startswith("NetAdapt"):
        criterion = variant.removeprefix("NetAdapt, ")
        options += [f"prune.folder={folder / 'netadapt' / f'{seed}-{resource}-{budget}-{criterion}'}"]
    return options


def job_of(row: Row) -> Job:
    return row["seed"], (row["resource"], row["budget"]), row["variant"]


def row_of(job: Job, summary: Summary) -> Row:
    """Return the row of a finished run; sizes and latency are ratios to the dense network."""
    seed, (resource, budget), variant = job
    dense, final = summary.dense, summary.final
    assert dense is not None
    assert dense.latency_ms
    assert final is not None
    assert final.latency_ms
    return {
        "seed": seed,
        "resource": resource,
        "budget": budget,
        "variant": variant,
        "miou": summary.test["miou"],
        "macs": final.macs / dense.macs,
        "params": final.params / dense.params,
        "latency": final.latency_ms / dense.latency_ms,
        "seconds": summary.seconds,
        "epochs": summary.epochs,
        "steps": summary.steps,
        "candidate_steps": summary.candidate_steps,
    }


def execute(job: Job, folder: Path, part: str, small: bool) -> Iterator[Row]:
    """Run one job and yield its row."""
    scratch = folder / f"run-{part.replace('/', '-of-')}"
    summary = run(configuration(job, folder, small), scratch, prefix=f"{job} │ ")
    shutil.rmtree(scratch)
    yield row_of(job, summary)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("methods", __doc__)
    parser.add_argument("--resources", nargs="+", choices=("macs", "latency"), default=["macs", "latency"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not args.report:
        budgets = [budget for budget in BUDGETS if budget[0] in args.resources]
        pruned = jobs(args.seeds, budgets, args.variants)
        dense = [(seed, ("macs", 1.0), DENSE) for seed in args.seeds]
        todo = [job for (job,) in jobs([*dense, *pruned], part=args.part)]
        run_job = partial(execute, folder=args.folder, part=args.part, small=args.small)
        study(todo, args.folder, args.part, run_job, job_of)
    write(finished(args.folder), args.docs)


if __name__ == "__main__":
    main()
