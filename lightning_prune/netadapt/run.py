"""NetAdapt: rounds in which every block is pruned on its own, and the best candidate is kept.

After Yang et al., ECCV 2018 (arXiv 1804.03230), with these additions: coupled layers and whole blocks are pruned
together, candidates are repaired before they are trained, their batch norms are estimated again (unless they are
repaired and hardly trained), and candidates that lost nothing are compared by their metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.compensation.calibration import CompensationSettings
from lightning_prune.netadapt.repair import SearchRepair
from lightning_prune.netadapt.rounds import Round, Rounds, SearchResult
from lightning_prune.netadapt.searcher import ONE_WORKER, Searcher
from lightning_prune.netadapt.workers import Workers
from lightning_prune.pruning.training import Training
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.utils.example_inputs import Example, as_example

__all__ = ["Round", "Rounds", "SearchResult", "check_search", "search"]

DEFAULT_ROUNDS = Rounds()


def search(
    model: nn.Module,
    example: Any,
    budget: Mapping[str, float] | PruningPolicy,
    training: Training,
    rounds: Rounds = DEFAULT_ROUNDS,
    workers: Workers = ONE_WORKER,
    *,
    compensate: bool | CompensationSettings = True,
    optimizer: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    report: Callable[[str], None] = print,
    verify: bool = True,
) -> SearchResult:
    """Prune ``model`` in place, round by round, to its budget.

    In each round, every block is pruned on its own by the criterion, within the limits, until the reduction of the
    round is met. Each such candidate is trained for a few steps and evaluated; ``model`` takes over the cut and the
    weights of the best one. A block that cannot be reduced enough on its own is left out of the round; if that is
    true of all blocks, those that can be reduced at all are compared. Each cut is proven, or the candidate is dropped
    with a warning. ``model`` is always the network after the last complete round.

    Args:
        model: the network, with its modules in the modes for training.
        example: its input: a tensor, a tuple, or a dictionary of named inputs.
        budget: what must remain of one resource, or a whole :class:`~lightning_prune.PruningPolicy`, whose ``amount``
            is not used.
        training: how candidates are trained and evaluated.
        rounds: the schedule.
        workers: where candidates are computed; the result does not depend on their number.
        compensate: repair each candidate after its cut, before it is trained: fit its layers to what the network that
            the round begins with gives on some training images, without labels; see
            :func:`~lightning_prune.compensation.compensate_`. If no images can be taken from the batches, nothing is
            repaired, with a warning. ``CompensationSettings`` in place of True say how much is looked at.
        optimizer: state of the optimizer that ``model`` was trained with; candidates continue with it, pruned
            likewise. None: new optimizers.
        folder: where the state is saved after each round. If it holds the state of a search with the same network and
            settings, that search is continued.
        verify: refuse a state in ``folder`` whose checksums are wrong.
        report: is called with one line per round; with ``print``, a terminal also shows the progress of the round.

    Returns:
        What was removed, and the result of each round.

    Raises:
        ValueError: a name matches nothing, the budget is out of range, no block can give the first reduction, or
            ``folder`` holds another search, or a damaged one. ``model`` is unchanged.
        RuntimeError: all candidates of a round failed; ``model`` is as after the round before.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> batches = [(torch.rand(4, 1, 8, 8), torch.rand(4, 1, 2, 2)) for _ in range(3)]
        >>> def loss(net, batch):
        ...     return (net(batch[0]) - batch[1]).square().mean()
        >>> training = Training(batches[:2], loss, lambda net: loss(net, batches[2]), higher_is_better=False)
        >>> policy, rounds = PruningPolicy({"macs": 0.5}), Rounds(rounds=2, steps=1)
        >>> result = search(net, batches[0][0][:1], policy, training, rounds, report=lambda line: None)
        >>> result.reached, [item.number for item in result.rounds]
        (True, [1, 2])
    """
    inputs = example if _is_example(example) else as_example(example)
    repair = SearchRepair.of(compensate, model, inputs, training.batches)
    searcher = Searcher(
        model, inputs, PruningPolicy.of(budget).with_budget(), training, rounds, workers, repair
    )
    return searcher.run(optimizer, None if folder is None else Path(folder), report, report is print, verify)


def _is_example(value: Any) -> bool:
    """Return whether a value has the form (positional inputs, keyword inputs) already."""
    is_pair = isinstance(value, tuple) and len(value) == 2
    return is_pair and isinstance(value[0], tuple) and isinstance(value[1], dict)


def check_search(model: nn.Module, example: Example, policy: PruningPolicy, rounds: Rounds) -> None:
    """Raise ValueError for what :func:`search` would refuse, before there is any data."""
    no_training = Training([None], lambda net, batch: torch.zeros(()), lambda net: 0.0)
    Searcher(model, example, policy, no_training, rounds, ONE_WORKER)
