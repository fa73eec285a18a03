"""Score networks right after one cut, without training: as cut, with recalibrated norms, and repaired.

    python -m benchmarks.quality.one_cut                 # 18 dense networks, 288 cuts; two hours of one core
    python -m benchmarks.quality.one_cut --part 1/2      # half of the cuts; start --part 2/2 as a second process
    python -m benchmarks.quality.one_cut --report        # only write docs/results/one_cut.md

Six networks (those of ``benchmarks.quality``, a MobileNetV2, a vision transformer, one with group norms) are trained
once per seed, and cut to 50 and 26 % of the MACs by eight criteria. Every layer keeps an eighth of its channels and
at least four. Criteria, recalibration and repair see the same training images, 512 for classifiers, 32 for U-Nets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.studies import Row, finished, jobs, study, study_parser
from benchmarks.quality.one_cut.cuts import CRITERIA, measured, trained
from benchmarks.quality.one_cut.networks import NETWORKS
from benchmarks.quality.one_cut.report import write
from benchmarks.quality.one_cut.trials import TRIALS_FOLDER
from benchmarks.quality.tasks import FOLDER

SHARES = (0.5, 0.26)
Job = tuple[int, float, str, str]  # seed, share of the MACs, network, criterion


def execute(job: Job, size: str, networks: Path) -> Iterator[Row]:
    """Yield the row of one cut."""
    seed, share, name, criterion = job
    task, network, dense_score = trained(name, size, seed, networks, "test")
    cut = measured(task, network, criterion, share, seed)
    yield {
        "seed": seed,
        "network": name,
        "share": share,
        "criterion": criterion,
        "dense": dense_score,
        "macs": round(cut.macs, 4),
        "raw": cut.raw,
        "recalibrated": cut.recalibrated,
        "repaired": cut.repaired,
        "refined": cut.refined,
        "seconds": round(cut.repair.seconds, 2),
        "forwards": cut.repair.forwards,
        "megabytes": round(cut.repair.megabytes),
        "refined_seconds": round(cut.refinement.seconds, 2),
        "refined_megabytes": round(cut.refinement.megabytes),
        "accepted": cut.repair.report.accepted,
        "not_refined": cut.refinement.report.not_refined,
        "images": task.calibration,
        "left_alone": len(cut.repair.report.left_alone),
    }


def job_of(row: Row) -> Job:
    return row["seed"], row["share"], row["network"], row["criterion"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("quality.one_cut", __doc__)
    parser.set_defaults(seeds=[1, 2, 3], folder=Path("outputs") / "one_cut")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--dense", type=Path, default=FOLDER, help="folder of the trained networks")
    args = parser.parse_args(arguments)
    if not args.report:
        torch.set_num_threads(1)
        size = "small" if args.small else "study"
        run = partial(execute, size=size, networks=args.dense)
        todo = jobs(args.seeds, args.shares, args.networks, args.criteria, part=args.part)
        study(todo, args.folder, args.part, run, job_of)
    rows = finished(args.folder)
    write([*rows, *finished(args.folder / TRIALS_FOLDER)] if rows else [], args.docs)


if __name__ == "__main__":
    main()
