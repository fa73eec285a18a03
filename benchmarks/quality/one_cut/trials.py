"""Try what could keep more of a network right after one cut, on validation images.

    python -m benchmarks.quality.one_cut.trials          # a few minutes; then --report of benchmarks.quality.one_cut

The rows lie in a folder within that of the study. All trials repair the same cuts to 26 % of the MACs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch

from benchmarks.common.studies import Row, jobs, study, study_parser
from benchmarks.quality.one_cut.cuts import TEST_IMAGES, criteria, plan_of, trained
from benchmarks.quality.tasks import FOLDER, score
from lightning_prune import ChannelGraph, Plan, prune_, trace
from lightning_prune.compensation import CompensationSettings, collect_targets, compensate_
from lightning_prune.surgery.prune import surviving_indices
from lightning_prune.utils.batch_norm import recalibrate_

__all__ = ["TRIALS", "TRIALS_FOLDER", "Trial"]

TRIALS_FOLDER = "trials"  # in the folder of the study's results
SHARE, SEED = 0.26, 1


@dataclass(frozen=True)
class Trial:
    """A repair that differs from the default one.

    Attributes:
        settings: of the repair.
        images: times as many as the default repair sees.
        recalibrates: whether batch norms are estimated anew afterwards.
    """

    settings: CompensationSettings = field(default_factory=CompensationSettings)
    images: int = 1
    recalibrates: bool = False


TRIALS = {
    "default": Trial(),
    "branches not fitted to sums": Trial(CompensationSettings(sums=False)),
    "activations not taken into account": Trial(CompensationSettings(activations=False)),
    "four times the positions": Trial(CompensationSettings(positions=16384)),
    "four times the images": Trial(images=4),
    "four times the images and positions": Trial(CompensationSettings(positions=16384), images=4),
    "norms estimated anew afterwards": Trial(recalibrates=True),
    "refined, 5 passes": Trial(CompensationSettings(refine_passes=5)),
    "refined, 15 passes": Trial(CompensationSettings(refine_passes=15)),
    "refined, 30 passes": Trial(CompensationSettings(refine_passes=30)),
    "refined, 15 passes of four times the images": Trial(CompensationSettings(refine_passes=15), images=4),
}
Job = tuple[str, str, str]  # network, criterion, trial


@lru_cache(maxsize=1)
def planned(name: str, criterion: str, size: str, networks: Path) -> tuple[ChannelGraph, Plan]:
    """Return the cut that all trials repair."""
    task, network, _ = trained(name, size, SEED, networks, "val")
    return plan_of(task, network, criteria(SEED)[criterion], SHARE)


def execute(job: Job, size: str, networks: Path) -> Iterator[Row]:
    """Yield the row of one trial."""
    name, criterion, trial = job
    task, network, dense_score = trained(name, size, SEED, networks, "val")
    graph, plan = planned(name, criterion, size, networks)
    small = copy.deepcopy(network)
    images = list(task.data.train.first(task.calibration * TRIALS[trial].images).images.split(32))
    started = time.process_time()
    targets = collect_targets(
        network, surviving_indices(graph, graph.kept(plan.remove)), images, TRIALS[trial].settings
    )
    prune_(small, trace(small, task.example), plan.remove)
    compensate_(small, targets, images)
    if TRIALS[trial].recalibrates:
        recalibrate_(small, [((batch,), {}) for batch in images])
    seconds = time.process_time() - started
    kept = score(small, task, task.data.val.first(TEST_IMAGES)).value / dense_score
    yield {
        "trial": trial,
        "network": name,
        "criterion": criterion,
        "kept": round(kept, 4),
        "seconds": round(seconds, 2),
    }


def job_of(row: Row) -> Job:
    return row["network"], row["criterion"], row["trial"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("quality.one_cut", __doc__)
    parser.set_defaults(folder=Path("outputs") / "one_cut")
    parser.add_argument("--networks", nargs="+", default=["ResNet-20", "U-Net, scenes"])
    parser.add_argument("--criteria", nargs="+", default=["L2 uniform", "LAMP", "IPAD 1"])
    parser.add_argument("--dense", type=Path, default=FOLDER, help="folder of the trained networks")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run = partial(execute, size="small" if args.small else "study", networks=args.dense)
    todo = jobs(args.networks, args.criteria, list(TRIALS), part=args.part)
    study(todo, args.folder / TRIALS_FOLDER, args.part, run, job_of)


if __name__ == "__main__":
    main()
