"""Compare networks that lose residual blocks and channels with those that lose channels alone, by measured latency.

    python -m benchmarks.depth                # dense networks of two architectures, each cut eight times
    python -m benchmarks.depth --seeds 1 2 3  # more of them; finished cuts are not repeated
    python -m benchmarks.depth --report       # only write docs/results/depth.md

Each dense network is trained, then cut in one shot and repaired without labels, and not trained afterwards.
Criterion, limits, images and repair are the same for both; as large a share of the blocks vanishes as of the MACs.
The latency of a cut network is measured in turns with the dense one: one image, one thread, in the processor time of
that thread. Scores are compared at equal latency, by interpolation between the measured cuts of one network.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.studies import Row, finished, jobs, study, study_parser
from benchmarks.depth.report import write
from benchmarks.quality.networks import floors_of, policy
from benchmarks.quality.one_cut.cuts import TEST_IMAGES, trained
from benchmarks.quality.tasks import score
from lightning_prune import DepthSettings, one_shot, residual_blocks
from lightning_prune.criteria.ipad import default_criterion
from lightning_prune.latency.timing import time_against_reference

NETWORKS = ("ResNet-20", "MobileNetV2-like")
SHARES = (0.7, 0.5, 0.3, 0.15)
METHODS = ("width", "depth and width")
Job = tuple[int, str, float, str]  # seed, network, share of the MACs, method


def execute(job: Job, size: str, folder: Path) -> Iterator[Row]:
    """Yield the row of one cut."""
    seed, name, share, method = job
    task, dense, dense_score = trained(name, size, seed, folder, "test")
    network, example = copy.deepcopy(dense), task.example
    rules = policy(dense, example, share, floors_of(dense, example))
    images = [images for images, _ in task.calibration_batches()]
    depth = None
    if method != "width":
        number = round((1 - share) * len(residual_blocks(dense, example)))
        depth = DepthSettings(blocks=number, max_depth_ratio=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = one_shot(network, example, rules, default_criterion(), images, depth=depth)
    test = task.data.test.first(TEST_IMAGES)
    with torch.no_grad():
        calls = [partial(net.eval(), example) for net in (dense, network)]
        before, after = time_against_reference(calls[0], calls[1:], torch.device("cpu"), 1, times=30)
    blocks = [name for what in record.vanished.values() for name in what.get("blocks", ())]
    yield {
        "seed": seed,
        "network": name,
        "share": share,
        "method": method,
        "dense": dense_score,
        "score": score(network, task, test).value,
        "latency": after / before,
        "milliseconds": after / 1e6,
        "dense_milliseconds": before / 1e6,
        "blocks": blocks,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, and write its page."""
    parser = study_parser("depth", __doc__ or "")
    parser.add_argument("--networks", type=Path, default=None, help="folder of trained dense networks")
    options = parser.parse_args(arguments)
    size = "small" if options.small else "study"
    if not options.report:
        torch.set_num_threads(1)
        todo = jobs(options.seeds, NETWORKS, SHARES, METHODS, part=options.part)
        networks = options.networks or options.folder / "dense"
        run = partial(execute, size=size, folder=networks)
        study(todo, options.folder, options.part, run, _job_of)
    write(finished(options.folder), options.docs)


def _job_of(row: Row) -> Job:
    return row["seed"], row["network"], row["share"], row["method"]


if __name__ == "__main__":
    main()
