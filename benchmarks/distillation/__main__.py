"""Compare losses of distillation: a U-Net on brain slices, pruned to 26 and 10 % of the MACs.

    python -m benchmarks.distillation                    # 3 dense and 30 pruned runs; an hour or two on one thread
    python -m benchmarks.distillation --part 1/2         # half of the runs; start --part 2/2 as a second process
    python -m benchmarks.distillation --report           # only write docs/results/distillation.md and its picture

Each run is that of ``lightning-prune experiment=study_pruned distill=...``: same data, epochs, optimizer and
schedule, on one thread. The teacher of a seed is the fully trained dense network of that seed, trained once. Runs in
``runs*.jsonl`` are not repeated, so the command can be stopped and started again.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.common.studies import Row, finished, jobs, study, study_parser
from benchmarks.distillation.report import write
from lightning_prune.cli.config import conf_dir
from lightning_prune.cli.train import run, trained_teacher
from lightning_prune.reporting.run_folder import Summary

BUDGETS = (0.26, 0.10)
VARIANTS = ("none", "hinton", "attention", "fsp", "all")
LIMITS = {0.10: 0.93}  # of a layer's parameters; the study's limit of 85 % leaves at least 17 % of the MACs
SMALL = ("data.slices_per_axis=6", "data.size=32", "trainer.max_epochs=4", "prune.amount={macs: 0.5}")
Job = tuple[int, float, str]  # seed, share of the MACs, loss


def configuration(
    seed: int, budget: float, variant: str, teachers: Path, more: Sequence[str] = ()
) -> DictConfig:
    """Return the configuration of one run.

    Args:
        seed: of data, weights and order.
        budget: share of the MACs.
        variant: option of ``distill=``.
        teachers: folder of the trained teachers.
        more: further overrides.
    """
    limit = [f"prune.limits.layers={LIMITS[budget]}"] if budget in LIMITS else []
    overrides = [
        f"seed={seed}",
        f"prune.budget.macs={budget}",
        f"distill={variant}",
        "distill.temperature=4",  # as in the stored runs
        f"teachers={teachers}",
        *limit,
    ]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        quiet = ["logger=none", "checkpoint=none"]
        return compose("config", overrides=["experiment=study_pruned", *quiet, *overrides, *more])


def row_of(job: Job, summary: Summary) -> Row:
    seed, budget, variant = job
    last = summary.curves[-1]
    return {
        "seed": seed,
        "budget": budget,
        "variant": variant,
        "test_miou": summary.test["miou"],
        "val_miou": last["val/miou"],
        "macs": summary.final.macs / summary.dense.macs if summary.final and summary.dense else None,
        "seconds": round(summary.seconds, 1),
        "epochs": summary.epochs,
        "parts": {name: value for name, value in last.items() if name.startswith("distill/")},
    }


def execute(job: Job, folder: Path, part: str, more: Sequence[str] = ()) -> Iterator[Row]:
    """Run one job and yield its row; the first job of a seed yields the row of the dense network before."""
    config = configuration(*job, folder / "teachers", more)
    teacher = trained_teacher(config).parent
    if (job[0], 1.0, "dense") not in map(job_of, finished(folder)):
        yield row_of((job[0], 1.0, "dense"), Summary.load(teacher))
    scratch = folder / f"run-{part.replace('/', '-of-')}"
    yield row_of(job, run(config, scratch, prefix=f"{job} │ "))
    shutil.rmtree(scratch)


def job_of(row: Row) -> Job:
    return row["seed"], row["budget"], row["variant"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("distillation", __doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "the teacher is worse than its student")  # the table shows it
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not args.report:
        todo = jobs(args.seeds, args.budgets, args.variants, part=args.part)
        more = SMALL if args.small else ()
        study(
            todo,
            args.folder,
            args.part,
            partial(execute, folder=args.folder, part=args.part, more=more),
            job_of,
        )
    write(finished(args.folder), args.docs)


if __name__ == "__main__":
    main()
