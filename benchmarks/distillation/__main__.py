"""Does distillation win back what pruning lost? U-Net on brain slices, at 26 and 10 % of the MACs.

    python -m benchmarks.distillation                    # 3 dense and 30 pruned runs; an hour or two on one thread
    python -m benchmarks.distillation --part 1/2         # one half of them, beside a second process with --part 2/2
    python -m benchmarks.distillation --report           # docs/distillation.json and .png, and the table's page

Every run is that of ``lightning-prune experiment=study_pruned distill=...``: same data, epochs, optimizer and
schedule, on one thread. The teacher of a seed is the dense network of that seed, trained to its end, once. A run
that is in ``runs*.jsonl`` is not repeated, so the command may be stopped and started again.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.common.studies import Row, arguments, finished, jobs, study
from benchmarks.distillation.report import write
from lightning_prune.cli.config import conf_dir
from lightning_prune.cli.train import run, trained_teacher
from lightning_prune.reporting.run_folder import Summary

BUDGETS = (0.26, 0.10)
VARIANTS = ("none", "hinton", "attention", "fsp", "all")
LIMITS = {0.10: 0.93}  # of a layer's parameters; with the 85 % of the study 17 % of the MACs stay
SMALL = ("data.slices_per_axis=6", "data.size=32", "trainer.max_epochs=4", "prune.amount={macs: 0.5}")
Job = tuple[int, float, str]


def configuration(
    seed: int, budget: float, variant: str, teachers: Path, more: Sequence[str] = ()
) -> DictConfig:
    limit = [f"prune.limits.layers={LIMITS[budget]}"] if budget in LIMITS else []
    given = [
        f"seed={seed}",
        f"prune.budget.macs={budget}",
        f"distill={variant}",
        f"teachers={teachers}",
        *limit,
    ]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=["experiment=study_pruned", "logger=none", *given, *more])


def row(job: Job, summary: Summary) -> Row:
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
    """The run, after that of the dense network of its seed if it is the first of them."""
    config = configuration(*job, folder / "teachers", more)
    teacher = trained_teacher(config).parent
    if (job[0], 1.0, "dense") not in map(job_of, finished(folder)):
        yield row((job[0], 1.0, "dense"), Summary.load(teacher))
    scratch = folder / f"run-{part.replace('/', '-of-')}"
    yield row(job, run(config, scratch, prefix=f"{job} │ "))
    shutil.rmtree(scratch)


def job_of(found: Row) -> Job:
    return found["seed"], found["budget"], found["variant"]


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("distillation", __doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    asked = parser.parse_args(given)
    warnings.filterwarnings("ignore", "the teacher is worse than its student")  # it is in the table
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not asked.report:
        todo = jobs(asked.seeds, asked.budgets, asked.variants, part=asked.part)
        more = SMALL if asked.small else ()
        study(
            todo, asked.folder, asked.part, lambda job: execute(job, asked.folder, asked.part, more), job_of
        )
    write(finished(asked.folder), asked.docs)


if __name__ == "__main__":
    main()
