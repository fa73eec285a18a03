"""Pruning as one goes, by rounds, by a penalty, at once, or at random: the same data, steps and budgets.

    python -m benchmarks.methods                     # three seeds, eight methods, three budgets
    python -m benchmarks.methods --part 1/2          # one half of the runs, beside a second process with --part 2/2
    python -m benchmarks.methods --report            # only docs/methods.md, .json and .png of what is there

Every run is a ``lightning-prune experiment=study prune=...``: a U-Net on BrainSlices from scratch, one thread, 24
epochs of 21 steps. NetAdapt holds a fifth of the samples out to judge its candidates, whose steps count, too: so it
trains for 27 epochs of 16 steps, and comes to about as many.
Latency is that of one image on one thread, the dense network and the pruned one measured in turns.
A run that is in ``runs*.jsonl`` is not repeated, so the command may be stopped and started again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.common.studies import Row, arguments, finished, jobs, study
from benchmarks.methods.report import write
from lightning_prune.cli.config import conf_dir
from lightning_prune.cli.train import run
from lightning_prune.reporting.run_folder import Summary

BUDGETS = (("macs", 0.5), ("macs", 0.26), ("latency", 0.5))  # the last by the table, as predicted
DENSE = "dense"
STEPWISE = ["experiment=study_pruned"]  # a tenth of the MACs after each epoch from the third on
SLIMMED = ["experiment=study_slimmed"]  # until the end of the sixteenth epoch
SECONDS = ["+prune/resources=latency", "prune.resources.latency.threads=1"]
ROUNDS = ["experiment=study", "prune=netadapt", "trainer.max_epochs=27"]  # fewer and shorter: see above
VARIANTS = {
    "IPAD, omega 1": [*STEPWISE, "prune/criterion=ipad_weights"],
    "random": [*STEPWISE, "prune/criterion=random"],
    "one shot, L2": ["experiment=study", "prune=oneshot"],
    "NetAdapt, L2": ROUNDS,
    "NetAdapt, Taylor": [*ROUNDS, "prune/criterion=taylor_weight"],
    "slimming, MACs": [*SLIMMED, "prune.by=macs"],
    "slimming, seconds": [*SLIMMED, "prune.by=latency"],
    "Taylor, gates": [*STEPWISE, "prune/criterion=taylor_gate"],
}
LIMIT = 0.85  # of a layer's parameters may go, for all
SMALL = ["data.slices_per_axis=6", "data.size=32", "trainer.max_epochs=4", "latency_runs=2"]
Job = tuple[int, tuple[str, float], str]


def configuration(job: Job, folder: Path, small: bool = False) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=[*overrides(job, folder), *(SMALL if small else ())])


def overrides(job: Job, folder: Path) -> list[str]:
    seed, (resource, budget), variant = job
    given = ["logger=none", f"seed={seed}", "latency_runs=30"]
    if variant == DENSE:
        return [*given, "experiment=study", "prune=none"]
    given += [*VARIANTS[variant], f"prune.limits.layers={LIMIT}", "~prune.budget.macs"]
    given += [f"+prune.budget.{resource}={budget}"]
    if resource == "latency" or variant.endswith("seconds"):
        given += [*SECONDS, f"prune.resources.latency.path={folder / 'latency'}"]
    if variant.startswith("NetAdapt"):
        given += [f"prune.folder={folder / 'netadapt' / f'{seed}-{resource}-{budget}-{variant[10:]}'}"]
    return given


def job_of(row: Row) -> Job:
    return row["seed"], (row["resource"], row["budget"]), row["variant"]


def row(job: Job, summary: Summary) -> Row:
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
    scratch = folder / f"run-{part.replace('/', '-of-')}"
    summary = run(configuration(job, folder, small), scratch, prefix=f"{job} │ ")
    shutil.rmtree(scratch)
    yield row(job, summary)


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("methods", __doc__)
    parser.add_argument("--resources", nargs="+", choices=("macs", "latency"), default=["macs", "latency"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    asked = parser.parse_args(given)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not asked.report:
        budgets = [budget for budget in BUDGETS if budget[0] in asked.resources]
        pruned = jobs(asked.seeds, budgets, asked.variants)
        todo = jobs([*((seed, ("macs", 1.0), DENSE) for seed in asked.seeds), *pruned], part=asked.part)
        once = partial(execute, folder=asked.folder, part=asked.part, small=asked.small)
        study([job for (job,) in todo], asked.folder, asked.part, once, job_of)
    write(finished(asked.folder), asked.docs)


if __name__ == "__main__":
    main()
