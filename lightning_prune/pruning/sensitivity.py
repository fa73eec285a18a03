"""Sensitivity: the score of a network against the share of filters removed, layer by layer.

After Li et al., Pruning Filters for Efficient ConvNets (ICLR 2017), figure 2; there by L1, each layer by itself.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_prune.criteria.base import CriterionLike, as_criterion, check_importance
from lightning_prune.criteria.ipad import IPAD
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.trace import trace
from lightning_prune.selection.coupled_blocks import CoupledBlock, find_blocks
from lightning_prune.selection.select import rank_units
from lightning_prune.surgery.prune import SurgeryError, prune_
from lightning_prune.surgery.rollback import snapshot
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.batch_norm import recalibrate_
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.formatting import counted
from lightning_prune.utils.passing import on_all

__all__ = ["Row", "Sensitivity", "sensitivity"]

SHARES = tuple(number / 10 for number in range(1, 10))


@dataclass(frozen=True)
class Row:
    """One group of coupled layers; most groups are a single layer.

    Attributes:
        name: name of the group.
        layers: names of the weights that lose filters together.
        units: number of units that may be removed.
        scores: result of ``evaluate`` for each share; NaN where surgery refused the cut, with a warning.
    """

    name: str
    layers: tuple[str, ...]
    units: int
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Result of :func:`sensitivity`.

    Attributes:
        dense: score of the dense network.
        shares: the shares of filters that were removed.
        rows: one per group, in the order of the forward.
        seconds: duration.
    """

    dense: float
    shares: tuple[float, ...]
    rows: tuple[Row, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, with None for NaN."""
        plain = asdict(self)
        for row in plain["rows"]:
            row["scores"] = [None if math.isnan(score) else score for score in row["scores"]]
        return plain


def sensitivity(
    model: nn.Module,
    example: Example,
    evaluate: Callable[[nn.Module], float],
    *,
    criterion: CriterionLike | None = None,
    shares: Sequence[float] = SHARES,
    exclude: Sequence[str] = (),
    recalibrate: Iterable[Example] = (),
    progress: Callable[[int, int, Row], None] | None = None,
) -> Sensitivity:
    """Remove the least important filters of one group of layers at a time, and score the smaller network.

    Filters that can only be removed together (as by residual connections) make one row. Cuts are made on a copy, one
    after the other, by the same proven surgery as in training; ``model`` is not changed. At least one filter always
    stays. A cut that surgery refuses scores NaN, with a warning that names the layer and the reason.

    Args:
        model: the network; scored in eval mode.
        example: positional and keyword inputs of its forward.
        evaluate: scores a network; must not change it.
        criterion: scores the filters by weights alone, since no statistics are collected; by default IPAD with
            omega 1.
        shares: shares of a group's filters to remove, each in (0, 1).
        exclude: names or globs of layers that are left out.
        recalibrate: inputs on which the statistics of batch norms are estimated anew before a cut is scored, but not
            for the dense score; by default none, which shows the raw damage.
        progress: called after each row with the number of finished rows, the total, and the row.

    Returns:
        The scores of all groups and shares.

    Raises:
        ValueError: a share is out of range, nothing can be pruned, or the criterion needs statistics.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        >>> count = lambda net: sum(p.numel() for p in net.parameters())
        >>> result = sensitivity(net, ((torch.zeros(1, 1, 8, 8),), {}), count, shares=[0.5])
        >>> result.dense, [(row.name, row.scores) for row in result.rows]
        (50, [('0', (26,))])
    """
    start = time.perf_counter()
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares must lie within (0, 1), got {list(shares)}")
    twin = copy.deepcopy(model).eval()
    graph = trace(twin, *example[0], **example[1])
    importance, examples = _importance(criterion or IPAD(omega=1.0), graph, twin), list(recalibrate)
    groups = _groups(graph, importance, exclude)
    if not groups:
        raise ValueError("nothing to prune: every filter is pinned, excluded, or infinitely important")
    dense, rows = _score(twin, evaluate, []), []
    for block, units in groups:
        scores = tuple(
            _cut_score(twin, graph, block.name, units, share, evaluate, examples) for share in shares
        )
        rows.append(Row(block.name, tuple(block.layers), len(units), scores))
        if progress is not None:
            progress(len(rows), len(groups), rows[-1])
    return Sensitivity(dense, tuple(shares), tuple(rows), time.perf_counter() - start)


def _importance(criterion: CriterionLike, graph: ChannelGraph, model: nn.Module) -> NDArray[np.float64]:
    """Return importance by weights alone; raise ValueError if the criterion needs statistics."""
    if as_criterion(criterion).observer(graph, model) is not None:
        raise ValueError(
            f"{criterion} needs statistics of activations or gradients, and sensitivity collects none: choose a "
            "criterion of weights alone, such as L1, L2, FPGM or IPAD with omega 1"
        )
    return check_importance(graph, criterion(graph, model, {}))


def _groups(
    graph: ChannelGraph, importance: NDArray[np.float64], exclude: Sequence[str]
) -> list[tuple[CoupledBlock, Units]]:
    """Return each group that can lose units, with its units in the order of importance."""
    blocks = find_blocks(graph, exclude=exclude)
    free = [rank_units(np.intersect1d(block.units(graph), graph.prunable), importance) for block in blocks]
    return [(block, units) for block, units in zip(blocks, free, strict=True) if len(units)]


def _cut_score(
    model: nn.Module,
    graph: ChannelGraph,
    name: str,
    units: Units,
    share: float,
    evaluate: Callable[[nn.Module], float],
    examples: Sequence[Example],
) -> float:
    """Return the score without the least important ``share`` of the units; NaN if surgery refuses."""
    number = min(round(share * len(units)), len(units) - 1)
    with _rolled_back(model, graph):
        try:
            on_all(lambda: prune_(model, graph, units[:number]))
        except SurgeryError as error:
            warnings.warn(
                f"{name} without {number} of {counted(len(units), 'filter')} is refused: {error}",
                stacklevel=4,
            )
            return math.nan
        return _score(model, evaluate, examples)


@contextmanager
def _rolled_back(model: nn.Module, graph: ChannelGraph) -> Iterator[None]:
    """Undo a cut made inside the context at its end, so that one trace serves all cuts."""
    restore = snapshot(model, graph.bindings)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        restore()
        for buffer, value in buffers:  # recalibration changes the buffers of uncut norms in place
            buffer.copy_(value)


def _score(model: nn.Module, evaluate: Callable[[nn.Module], float], examples: Sequence[Example]) -> float:
    """Estimate batch norms on ``examples`` and score the network in eval mode."""
    recalibrate_(model, examples)
    with torch.no_grad():
        return evaluate(model.eval())
