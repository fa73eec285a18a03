"""NetAdapt: rounds in which every block is pruned alone, and the best candidate stays (level 3).

After Yang et al., ECCV 2018 (arXiv 1804.03230). It departs from the paper where that says nothing: coupled layers
and whole blocks are pruned together, a candidate's batch norms are estimated anew before it is judged, and a
candidate that lost nothing at all is ranked by what it won.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.netadapt.rounds import Round, Rounds, SearchResult
from lightning_prune.netadapt.searcher import ALONE, Search
from lightning_prune.netadapt.workers import Workers
from lightning_prune.pruning.training import Training
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.utils.example_inputs import Example, as_example

__all__ = ["Round", "Rounds", "SearchResult", "check", "search"]

STANDARD = Rounds()


def search(
    model: nn.Module,
    example: Any,
    rules: PruningPolicy,
    training: Training,
    rounds: Rounds = STANDARD,
    workers: Workers = ALONE,
    *,
    optimizer: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> SearchResult:
    """Prune ``model`` in place, round by round, to its budget.

    In each round every block is pruned alone until the round's reduction is met, by the criterion, within the
    limits; each candidate is trained for a few steps and judged; the best one's cut and weights stay. A block that
    cannot give the reduction alone sits out; where none can, those compete that can give some. Each cut is
    proven, or the candidate is dropped, with a warning. The network is always that of the last whole round.

    Args:
        model: the network, in the modes in which it is to be trained.
        example: its input: a tensor, a tuple, or a dictionary of named ones.
        rules: the budget, in one resource, and what may go; ``amount`` is not used.
        training: how candidates are trained and judged.
        rounds: the schedule.
        workers: where candidates are computed. The result does not depend on how many there are.
        optimizer: state of the optimizer that ``model`` was trained with; candidates go on with it, cut along.
        folder: where the state is kept after each round. A search of the same network and rules that finds a
            state there goes on from it.
        report: gets one line per round; with ``print``, candidates are counted on a terminal meanwhile.

    Returns:
        What was removed, and the facts of each round.

    Raises:
        ValueError: a name matches nothing, the budget is out of range, or no block can give the first reduction;
            or ``folder`` holds another search. ``model`` is as it was.
        RuntimeError: all candidates of a round failed; ``model`` is as after the round before.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> batches = [(torch.rand(4, 1, 8, 8), torch.rand(4, 1, 2, 2)) for _ in range(3)]
        >>> def loss(net, batch):
        ...     return (net(batch[0]) - batch[1]).square().mean()
        >>> training = Training(batches[:2], loss, lambda net: loss(net, batches[2]), higher_is_better=False)
        >>> found = search(net, batches[0][0][:1], Rules({"macs": 0.5}), training, Rounds(rounds=2, steps=1),
        ...                report=lambda line: None)
        >>> found.reached, [each.number for each in found.rounds]
        (True, [1, 2])
    """
    given = example if _is_example(example) else as_example(example)
    job = Search(model, given, rules, training, rounds, workers)
    return job.run(optimizer, None if folder is None else Path(folder), report, bar=report is print)


def _is_example(given: Any) -> bool:
    """Whether it is positional and keyword inputs already."""
    return (
        isinstance(given, tuple)
        and len(given) == 2
        and isinstance(given[0], tuple)
        and isinstance(given[1], dict)
    )


def check(model: nn.Module, example: Example, rules: PruningPolicy, rounds: Rounds) -> None:
    """Raise ValueError for what :func:`search` would refuse, before there is any data."""
    nothing = Training([None], lambda net, batch: torch.zeros(()), lambda net: 0.0)
    Search(model, example, rules, nothing, rounds, ALONE)
