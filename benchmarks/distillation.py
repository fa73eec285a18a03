"""Does distillation win back what pruning lost? U-Net on brain slices, at 26 and 10 % of the MACs.

    python -m benchmarks.distillation                    # 3 dense and 30 pruned runs; an hour or two on one thread
    python -m benchmarks.distillation --part 1/2         # one half of them, beside a second process with --part 2/2
    python -m benchmarks.distillation --report           # docs/distillation.json and .png, and the table's page

Every run is that of ``lightning-prune experiment=study_pruned distill=...``: same data, epochs, optimizer and
schedule, on one thread. The teacher of a seed is the dense network of that seed, trained to its end, once. A run
that is in ``runs*.jsonl`` is not repeated, so the command may be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from benchmarks.distillation_report import write
from lightning_prune.cli import conf_dir
from lightning_prune.experiment import run, trained_teacher
from lightning_prune.runs import Summary

SEEDS = (0, 1, 2)
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


def jobs(
    seeds: Sequence[int], budgets: Sequence[float], variants: Sequence[str], part: str = "1/1"
) -> list[Job]:
    """Seed by seed, so that an interrupted study has whole seeds; every n-th of them."""
    number, of = map(int, part.split("/"))
    return list(product(seeds, budgets, variants))[number - 1 :: of]


def finished(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("runs*.jsonl")):
        yield from map(json.loads, path.read_text().splitlines())


def row(job: Job, summary: Summary) -> dict[str, Any]:
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


def study(todo: Sequence[Job], folder: Path, part: str, more: Sequence[str] = ()) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"runs-{part.replace('/', '-of-')}.jsonl"
    for job in todo:
        done = {(found["seed"], found["budget"], found["variant"]) for found in finished(folder)}
        config = configuration(*job, folder / "teachers", more)
        teacher = trained_teacher(config).parent
        dense = (job[0], 1.0, "dense")
        for wanted in (dense, job):
            if wanted in done:
                continue
            scratch = folder / f"run-{part.replace('/', '-of-')}"
            summary = Summary.load(teacher) if wanted == dense else run(config, scratch, prefix=f"{job} │ ")
            with file.open("a") as lines:
                lines.write(json.dumps(row(wanted, summary)) + "\n")
            shutil.rmtree(scratch, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distillation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--part", default="1/1", help="i/n: the i-th of n processes")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/distillation"), help="of runs and teachers"
    )
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    parser.add_argument("--report", action="store_true", help="only write the tables of what is there")
    parser.add_argument(
        "--small", action="store_true", help="seconds a run, for a test of the command itself"
    )
    asked = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "the teacher is worse than its student")  # it is in the table
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not asked.report:
        todo = jobs(asked.seeds, asked.budgets, asked.variants, asked.part)
        study(todo, asked.folder, asked.part, SMALL if asked.small else ())
    write(list(finished(asked.folder)), asked.docs)


if __name__ == "__main__":
    main()
