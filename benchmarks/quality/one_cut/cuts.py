"""One cut of a trained network: its score as it is, with recalibrated norms, and repaired, and the repair's price."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import nn

from benchmarks.common.memory import peak_memory
from benchmarks.quality.data import Part
from benchmarks.quality.networks import Uniform, floors_of, policy
from benchmarks.quality.one_cut.networks import task_of
from benchmarks.quality.tasks import Task, dense, score
from benchmarks.quality.training import cross_entropy
from lightning_prune import ChannelGraph, Plan, prune_, trace
from lightning_prune.compensation import (
    CompensationReport,
    CompensationSettings,
    collect_targets,
    compensate_,
)
from lightning_prune.criteria import IPAD, L2, LAMP, Criterion, OutputEnergy, Random, TaylorGate
from lightning_prune.criteria.ipad import default_criterion
from lightning_prune.pruning.statistics_pass import collect_statistics
from lightning_prune.pruning.training import Training
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.surgery.prune import surviving_indices
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.batch_norm import recalibrate_

__all__ = [
    "CRITERIA",
    "REFINE_PASSES",
    "Repair",
    "Scores",
    "criteria",
    "measured",
    "plan_of",
    "repaired_",
    "trained",
]

TEST_IMAGES = 1000  # that each network is scored on
REFINE_PASSES = 15  # see CompensationSettings


def criteria(seed: int) -> dict[str, Criterion]:
    """Return the criteria by the names that the page shows."""
    return {
        "L2 uniform": Uniform(L2()),
        "L2": L2(),
        "LAMP": LAMP(),
        "IPAD 1": IPAD(omega=1.0),
        "Taylor": TaylorGate(),
        "energy": OutputEnergy(),
        "default": default_criterion(),
        "random": Random(seed),
    }


CRITERIA = tuple(criteria(0))


@dataclass(frozen=True)
class Repair:
    """Report of a repair, and its price without that of the cut.

    Attributes:
        report: of the repair.
        seconds: of the processor.
        forwards: of all images.
        megabytes: peak of the process's memory beyond that before.
    """

    report: CompensationReport
    seconds: float
    forwards: int
    megabytes: float


@dataclass(frozen=True)
class Scores:
    """Scores after one cut, without training.

    Attributes:
        macs: share of the dense MACs that is left.
        raw: as the cut leaves it.
        recalibrated: with the statistics of its batch norms estimated anew.
        repaired: after the repair.
        refined: after a repair with ``refine_passes``.
        repair: see :class:`Repair`.
        refinement: in the same way, with ``refine_passes``.
    """

    macs: float
    raw: float
    recalibrated: float
    repaired: float
    refined: float
    repair: Repair
    refinement: Repair


@lru_cache(maxsize=1)
def trained(name: str, size: str, seed: int, folder: Path, part: str) -> tuple[Task, nn.Module, float]:
    """Return a task, its dense network, and the network's score.

    Args:
        name: of the network, one of ``NETWORKS``.
        size: see ``benchmarks.quality.tasks``.
        seed: of the network.
        folder: of trained networks.
        part: of the data that the network is scored on: ``"val"`` or ``"test"``.
    """
    task = task_of(name, size)
    network = dense(task, seed, folder).eval()
    images: Part = getattr(task.data, part)
    return task, network, score(network, task, images.first(TEST_IMAGES)).value


def plan_of(task: Task, network: nn.Module, criterion: Criterion, share: float) -> tuple[ChannelGraph, Plan]:
    """Return the graph, and the units that go to reach ``share`` of the MACs."""
    graph, batches = trace(network, task.example), task.calibration_batches()
    statistics = collect_statistics(
        criterion, network, graph, batches, Training(batches, cross_entropy, lambda net: 0.0)
    )
    rules = policy(network, task.example, share, floors_of(network, task.example))
    return graph, rules.plan(graph, criterion(graph, network, statistics), DenseSizes.of(graph))


def repaired_(
    task: Task, network: nn.Module, remove: Units, settings: CompensationSettings | None = None
) -> Repair:
    """Cut ``network`` and repair it, and measure what the repair takes without the cut."""
    graph, images = trace(network, task.example), [images for images, _ in task.calibration_batches()]
    kept = surviving_indices(graph, graph.kept(remove))
    calls: list[int] = []
    with peak_memory() as peak, _counted(network, calls):
        started = time.process_time()
        targets = collect_targets(network, kept, images, settings)
        seconds = time.process_time() - started
        prune_(network, graph, remove)
        before = len(calls)
        started = time.process_time()
        report = compensate_(network, targets, images)
        seconds += time.process_time() - started
    return Repair(report, seconds, 1 + len(calls) - before, peak.megabytes)


@contextmanager
def _counted(network: nn.Module, calls: list[int]) -> Iterator[None]:
    """Append to ``calls`` whenever the network runs."""
    handle = network.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        yield
    finally:
        handle.remove()


def measured(task: Task, dense: nn.Module, criterion: str, share: float, seed: int) -> Scores:
    """Cut a trained network to ``share`` of its MACs and score it; ``dense`` stays as it is."""
    graph, plan = plan_of(task, dense, criteria(seed)[criterion], share)
    test = task.data.test.first(TEST_IMAGES)
    cut, repaired, refined = (copy.deepcopy(dense) for _ in range(3))
    prune_(cut, trace(cut, task.example), plan.remove)
    raw = score(cut, task, test).value
    recalibrated = raw
    if recalibrate_(cut, [((images,), {}) for images, _ in task.calibration_batches()]):
        recalibrated = score(cut, task, test).value
    repair = repaired_(task, repaired, plan.remove)
    refinement = repaired_(task, refined, plan.remove, CompensationSettings(refine_passes=REFINE_PASSES))
    macs = graph.cost("macs", plan.remove) / graph.cost("macs")
    after = (score(net, task, test).value for net in (repaired, refined))
    return Scores(macs, raw, recalibrated, *after, repair, refinement)
