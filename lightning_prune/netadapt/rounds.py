"""The plan of a search in rounds, and the facts of what came of it (level 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_prune.criteria.base import Criterion
from lightning_prune.criteria.weights import L2
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.utils.formatting import si
from lightning_prune.utils.tables import Table

__all__ = ["Round", "Rounds", "SearchResult"]


def rounds_table(rounds: Sequence[Round], resource: str) -> Table:
    """What each round did.

    Example:
        >>> first = Round(1, "decoder", 0.8, 0.79, {"decoder": 0.79}, {"macs": 90}, {"macs": 0.9}, 4, 10, 1.5)
        >>> print(rounds_table([first], "macs").markdown())
        | round | block   | candidates | metric before |  after |  macs | seconds |
        | :---- | :------ | ---------: | ------------: | -----: | ----: | ------: |
        | 1     | decoder |          1 |        0.8000 | 0.7900 | 90.0% |     1.5 |
    """
    rows = [
        (
            str(each.number),
            each.block,
            str(len(each.metrics)),
            f"{each.before:.4f}",
            f"{each.after:.4f}",
            f"{each.share[resource]:.1%}",
            f"{each.seconds:.1f}",
        )
        for each in rounds
    ]
    return Table(
        ("round", "block", "candidates", "metric before", "after", resource, "seconds"), rows, left=2
    )


BY_NORM = L2()
By = Literal["ratio", "metric"]
#: what takes the place of a block's name in the facts of the alignment; no module is called so
ALIGNED = "(alignment)"


@dataclass(frozen=True)
class Rounds:
    """How a search goes about it.

    Args:
        reduction: share of the dense network's resource that goes in the first round.
        decay: that of a round times this is that of the next: ``reduction * decay ** (i - 1)``.
        rounds: how many, in place of ``reduction``, which is then what they need to reach the budget.
        steps: of training that each candidate gets.
        blocks: see :func:`~lightning_prune.selection.coupled_blocks.find_blocks`.
        by: ``"ratio"`` keeps the candidate that lost least of the metric per resource gained, as the authors' code
            does, ``"metric"`` the one with the best metric, as their paper has it.
        criterion: which filters of a block go.
        align: after the last round, widths are rounded down to a multiple of this, group by group of coupled layers;
            1: they are not.
        tolerance: how much worse than before the alignment the metric may be with the groups that are rounded; None:
            all of them are. To keep widths multiples in every round, use ``Rules(channel_multiple=...)``.
        seed: of what is random in candidates.

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
    criterion: Criterion = BY_NORM
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
        """What goes in each round until the share ``budget`` remains.

        Raises:
            ValueError: the reductions fall so fast that they never get there.
        """
        left = 1 - budget
        if self.rounds is not None:
            first = left / sum(self.decay**i for i in range(self.rounds))
            return [first * self.decay**i for i in range(self.rounds)]
        most = self.reduction / (1 - self.decay) if self.decay < 1 else math.inf
        if most <= left:
            raise ValueError(
                f"reductions of {self.reduction:.3g} that decay by {self.decay:.3g} sum up to {most:.3g} of the "
                f"dense network, the budget of {budget:.3g} needs {left:.3g}: raise reduction or decay, or set rounds"
            )
        found: list[float] = []
        while sum(found) < left - 1e-12:
            found.append(self.reduction * self.decay ** len(found))
        return found


@dataclass(frozen=True)
class Round:
    """The facts of one round, as plain values.

    Attributes:
        number: from 1.
        block: whose candidate stayed; ``"(alignment)"`` of the one that rounds widths.
        before: metric before it.
        after: metric of the candidate that stayed.
        metrics: block -> metric of its candidate, NaN where it failed; blocks that cannot give the reduction are
            absent.
        cost: resource -> what the network costs now.
        share: resource -> what remains of the dense network's.
        removed: units that went.
        steps: optimizer steps of all candidates.
        seconds: that it took.
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

    def line(self, resource: str, rounds: int) -> str:
        """The round in one line."""
        left = f"{resource} {si(self.cost[resource])} ({self.share[resource]:.1%} of dense)"
        tried = f"{len(self.metrics)} candidate{'s' * (len(self.metrics) != 1)}"
        return (
            f"round {self.number}/{max(rounds, self.number)}: {self.block} · metric {self.before:.4f} → "
            f"{self.after:.4f} · {left} · {tried} · {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Attributes:
        record: of all that was removed.
        rounds: one after the other.
        reached: whether the budget is met.
        optimizer: state of the last winner's optimizer, to go on with; None if there was no round.
    """

    record: PruningRecord
    rounds: list[Round]
    reached: bool
    optimizer: dict[str, Any] | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of all candidates of all rounds."""
        return sum(each.steps for each in self.rounds)
