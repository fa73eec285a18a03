"""The schedule of a search in rounds, and its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_prune.criteria.base import CriterionLike
from lightning_prune.criteria.weights import L2
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.formatting import si
from lightning_prune.utils.tables import Table

__all__ = [
    "Round",
    "Rounds",
    "SearchResult",
    "remaining_time",
    "rounds_table",
    "single_resource",
    "target_share",
]


def rounds_table(rounds: Sequence[Round], resource: str) -> Table:
    """Return a table with a line for each round.

    Example:
        >>> first = Round(1, "decoder", 0.8, 0.79, {"decoder": 0.79}, {"macs": 90}, {"macs": 0.9}, 4, 10, 1.5)
        >>> print(rounds_table([first], "macs").markdown())
        | round | block   | candidates | metric before |  after |  macs | seconds |
        | :---- | :------ | ---------: | ------------: | -----: | ----: | ------: |
        | 1     | decoder |          1 |        0.8000 | 0.7900 | 90.0% |     1.5 |
    """
    rows = [
        (
            str(item.number),
            item.block,
            str(len(item.metrics)),
            f"{item.before:.4f}",
            f"{item.after:.4f}",
            f"{item.share[resource]:.1%}",
            f"{item.seconds:.1f}",
        )
        for item in rounds
    ]
    return Table(
        ("round", "block", "candidates", "metric before", "after", resource, "seconds"), rows, left=2
    )


L2_NORM = L2()
By = Literal["ratio", "metric"]
#: takes the place of the block's name for the alignment; no module can have this name
ALIGNED = "(alignment)"


@dataclass(frozen=True)
class Rounds:
    """Schedule of a search.

    Args:
        reduction: share of the dense network's resource that is removed in the first round.
        decay: factor from the reduction of one round to the next: round i removes ``reduction * decay ** (i - 1)``.
        rounds: number of rounds; it replaces ``reduction``, which is then computed so that they reach the budget.
        steps: optimizer steps of each candidate.
        blocks: see :func:`~lightning_prune.selection.coupled_blocks.find_blocks`.
        by: ``"ratio"`` keeps the candidate with the smallest loss of the metric per removed resource, as the authors'
            code does; ``"metric"`` keeps the one with the best metric, as their paper says.
        criterion: chooses the filters of a block.
        align: after the last round, widths are rounded down to a multiple of this number, one group of coupled layers
            after the other; 1: no alignment.
        tolerance: the largest loss of the metric, compared with before the alignment, at which a group stays rounded;
            None: every group is rounded. To keep multiples in every round, use
            ``PruningPolicy(channel_multiple=...)``.
        seed: of the random numbers of candidates.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> Rounds(rounds=4, decay=1.0).reductions(0.5)
        [0.125, 0.125, 0.125, 0.125]
        >>> len(Rounds().reductions(0.5))
        40
    """

    reduction: float = 0.025
    decay: float = 0.96
    rounds: int | None = None
    steps: int = 10
    blocks: int | Sequence[str] | None = None
    by: By = "ratio"
    criterion: CriterionLike = L2_NORM
    align: int = 1
    tolerance: float | None = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.reduction <= 1 or not 0 < self.decay <= 1:
            raise ValueError(f"need reduction and decay in (0, 1], got {self.reduction} and {self.decay}")
        if self.steps < 0 or (self.rounds is not None and self.rounds < 1):
            raise ValueError(f"need steps >= 0 and rounds >= 1, got {self.steps} and {self.rounds}")
        if self.align < 1 or (self.tolerance is not None and not self.tolerance >= 0):
            raise ValueError(f"need align >= 1 and tolerance >= 0, got {self.align} and {self.tolerance}")
        if self.by not in get_args(By):
            raise ValueError(f"by must be 'ratio' or 'metric', got {self.by!r}")

    def reductions(self, budget: float) -> list[float]:
        """Return the share that is removed in each round until the share ``budget`` remains.

        Raises:
            ValueError: the reductions decay so fast that they never reach the budget.
        """
        needed = 1 - budget
        if self.rounds is not None:
            first = needed / sum(self.decay**i for i in range(self.rounds))
            return [first * self.decay**i for i in range(self.rounds)]
        limit = self.reduction / (1 - self.decay) if self.decay < 1 else math.inf  # of the geometric series
        if limit <= needed:
            raise ValueError(
                f"reductions of {self.reduction:.3g} that decay by {self.decay:.3g} sum up to {limit:.3g} of the "
                f"dense network, but the budget of {budget:.3g} needs {needed:.3g}: raise reduction or decay, or "
                "set rounds"
            )
        reductions: list[float] = []
        while sum(reductions) < needed - 1e-12:
            reductions.append(self.reduction * self.decay ** len(reductions))
        return reductions


def single_resource(budget: Mapping[str, float]) -> str:
    """Return the resource of a budget; raise ValueError if there are several or none."""
    if len(budget) != 1:
        raise ValueError(
            f"a search reduces one resource, step by step; the budget names {sorted(budget) or 'none'}"
        )
    return next(iter(budget))


def target_share(budget: Mapping[str, float], dense: DenseSizes) -> float:
    """Return the share of the dense network that a budget in one resource leaves."""
    resource = single_resource(budget)
    target = budget[resource]
    return target if target <= 1 else target / max(dense.costs[resource], 1)


def remaining_time(seconds: float) -> str:
    """Return the end of a line that says how long the search will take.

    Example:
        >>> remaining_time(0), remaining_time(42.3), remaining_time(1500)
        ('', ' · about 42 s to go', ' · about 25 min to go')
    """
    if not seconds:
        return ""
    return f" · about {seconds:.0f} s to go" if seconds < 100 else f" · about {seconds / 60:.0f} min to go"


@dataclass(frozen=True)
class Round:
    """Result of one round, as plain values.

    Attributes:
        number: from 1.
        block: whose candidate was kept; ``"(alignment)"`` for the alignment.
        before: metric before the round.
        after: metric of the candidate that was kept.
        metrics: block -> metric of its candidate, NaN where it failed; blocks that cannot be reduced enough are
            absent.
        cost: resource -> cost of the network after the round.
        share: resource -> this cost as a share of the dense network's.
        removed: number of units that were removed.
        steps: optimizer steps of all candidates.
        seconds: duration of the round.
        change: squared distance of the outputs of the candidate that was kept from those before the round, as a share
            of their variance, without and with its repair, before it was trained; None if it was not repaired.

    Example:
        >>> one = Round(
        ...     number=1, block="0", before=0.9, after=0.89, metrics={"0": 0.89}, cost={"macs": 90},
        ...     share={"macs": 0.9}, removed=2, steps=10, seconds=1.5,
        ... )
        >>> one.metrics[one.block] == one.after
        True
    """

    number: int
    block: str
    before: float
    after: float
    metrics: dict[str, float]
    cost: dict[str, int]
    share: dict[str, float]
    removed: int
    steps: int
    seconds: float
    change: tuple[float, float] | None = None

    def line(self, resource: str, rounds: int) -> str:
        """Return the round as one line of text, out of ``rounds`` rounds."""
        remaining = f"{resource} {si(self.cost[resource])} ({self.share[resource]:.1%} of dense)"
        candidates = f"{len(self.metrics)} candidate{'s' * (len(self.metrics) != 1)}"
        repaired = f" · repaired, change {self.change[0]:.2g} → {self.change[1]:.2g}" if self.change else ""
        return (
            f"round {self.number}/{max(rounds, self.number)}: {self.block} · metric {self.before:.4f} → "
            f"{self.after:.4f} · {remaining}{repaired} · {candidates} · {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        record: of everything that was removed.
        rounds: result of each round, in order.
        reached: whether the budget is met.
        optimizer: state of the last kept candidate's optimizer, to continue training with; None without any round.

    Example:
        >>> one = Round(
        ...     number=1, block="0", before=0.9, after=0.89, metrics={"0": 0.89}, cost={"macs": 90},
        ...     share={"macs": 0.9}, removed=2, steps=10, seconds=1.5,
        ... )
        >>> SearchResult(PruningRecord({}, {}), [one], reached=True).steps
        10
    """

    record: PruningRecord
    rounds: list[Round]
    reached: bool
    optimizer: dict[str, Any] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of all candidates of all rounds."""
        return sum(item.steps for item in self.rounds)
