"""Cut a network of the second zoo to half of its MACs, and at random, and compare both with oracles."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from benchmarks.zoo.ours import (
    HALF,
    NO_LIMITS,
    TOLERANCE,
    VISIBLE,
    Units,
    awake_,
    describe_failure,
    lowest,
    units_of,
    with_one_left,
    without_refused,
)
from benchmarks.zoo.strangers.case import Case
from lightning_prune import ChannelGraph, SurgeryError, prune_, trace
from lightning_prune.criteria import L2
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.select import select
from lightning_prune.testing import (
    error,
    randomise_,
    with_dead_filters,
    with_masked_statistics,
    with_zeroed_consumers,
)

__all__ = ["measure"]

ATTEMPTS = 10  # as the callback
ORACLES: dict[str, Callable[..., nn.Module]] = {
    "masked": with_masked_statistics,
    "dead": with_dead_filters,
    "zeroed": with_zeroed_consumers,
    "distinct": partial(with_masked_statistics, leave_out_equal=True),
}
Choice = Callable[[ChannelGraph, nn.Module], Units]


def measure(case: Case) -> dict[str, Any]:
    """Trace the network, cut copies of it in several ways, compare each with oracles; return its row."""
    if not case.is_installed:
        return {"status": "not installed", "reason": f"the package {case.package} is missing"}
    torch.manual_seed(0)
    start = time.process_time()
    dense = awake_(randomise_(case.build())).eval()
    case.prepare(dense)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in dense.parameters())}
    try:
        for kind, choose in CHOICES.items():
            row[kind] = _cut(case, dense, choose, row)
        if any(_is_wrong(row[kind]) for kind in CHOICES):
            row["free"] = _cut(case, dense, _random_free, row)
    except Exception as failure:
        row |= describe_failure(failure)
    row["seconds"] = round(time.process_time() - start, 1)
    return {"status": _status(row), **row}


def _is_wrong(cut: dict[str, Any]) -> bool:
    return cut.get("verdict") == "wrong"


def _status(row: dict[str, Any]) -> str:
    """Return ``wrong``, ``refused`` or ``crashed`` if one of the cuts is so, else ``cut``."""
    statuses = {row[kind].get("verdict") or row[kind]["status"] for kind in CHOICES if kind in row}
    return next((status for status in ("crashed", "wrong", "refused") if status in statuses), "cut")


def half(graph: ChannelGraph, model: nn.Module) -> Units:
    """Return the units that a plan for half of the MACs removes, by the L2 norm of their weights."""
    scores, dense = L2()(graph, model, {}), DenseSizes.of(graph)
    return select(graph, scores, HALF, limits=NO_LIMITS, dense=dense).remove


def _random(graph: ChannelGraph, model: nn.Module) -> Units:
    return _random_share(graph, graph.prunable)


def _random_free(graph: ChannelGraph, model: nn.Module) -> Units:
    """Return a random half of the units that enter no statistics across channels."""
    return _random_share(graph, graph.prunable[~np.isin(graph.prunable, graph.statistics_units)])


def _random_share(graph: ChannelGraph, among: Units) -> Units:
    shuffled = np.random.default_rng(0).permutation(among)
    return with_one_left(graph, shuffled[: (len(shuffled) + 1) // 2])


CHOICES: dict[str, Choice] = {"half": half, "random": _random}


def _size(graph: ChannelGraph) -> dict[str, Any]:
    macs = max(graph.cost("macs"), 1)
    return {**units_of(graph), "macs": macs, "lowest": graph.cost("macs", lowest(graph)) / macs}


def _cut(case: Case, dense: nn.Module, choose: Choice, row: dict[str, Any]) -> dict[str, Any]:
    """Cut a copy of the network; units that surgery refuses are pinned, and others chosen, as the callback does.

    What the graph says is added to ``row``.
    """
    model = copy.deepcopy(dense)
    graph = trace(model, *case.inputs())
    row |= _size(graph)
    remove, graph, refusals, reason = _remove(model, graph, choose)
    if reason:
        return {"status": "refused", "reason": reason, "refusals": refusals}
    share = graph.cost("macs", remove) / max(graph.cost("macs"), 1)
    result = {"status": "cut", "removed": len(remove), "share": round(share, 4), "refusals": refusals}
    result["statistics"] = int(np.isin(remove, graph.statistics_units).sum())
    return {**result, **_compare(case, dense, model, graph, remove)}


def _remove(
    model: nn.Module, graph: ChannelGraph, choose: Choice
) -> tuple[Units, ChannelGraph, list[dict[str, Any]], str]:
    """Return what was removed, the graph with the pins of refusals, the refusals, and why nothing was removed."""
    refusals: list[dict[str, Any]] = []
    while True:
        if not len(graph.prunable):
            return graph.prunable, graph, refusals, _last_reason(refusals)
        remove = choose(graph, model)
        try:
            prune_(model, graph, remove)
            return remove, graph, refusals, ""
        except SurgeryError as refusal:
            refusals.append({"units": len(refusal.units), "reason": str(refusal)[:600]})
            if not len(refusal.units) or len(refusals) == ATTEMPTS:
                return remove, graph, refusals, refusals[-1]["reason"]
            graph = without_refused(graph, refusal)


def _last_reason(refusals: list[dict[str, Any]]) -> str:
    return str(refusals[-1]["reason"]) if refusals else "nothing can be removed"


class _Outputs(nn.Module):
    """The outputs of a network, computed once, without random numbers of dropout and noise that are in eval mode too.

    A smaller network draws fewer of them, so that all that follow are others.
    """

    def __init__(self, case: Case, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        torch.manual_seed(2)
        no_dropout = patch.object(F, "dropout", lambda x, *args, **kwargs: x)
        with torch.no_grad(), no_dropout, patch.object(torch, "randn_like", torch.zeros_like):
            outputs = case.outputs(network.eval()(*inputs))
        self.outputs = tree_map_only(Tensor, lambda x: x.double(), outputs)

    def forward(self) -> Any:
        """Return them."""
        return self.outputs


def _compare(
    case: Case, dense: nn.Module, pruned: nn.Module, graph: ChannelGraph, remove: Units
) -> dict[str, Any]:
    """Return the errors against the oracles in double precision, up to the first that agrees, and the verdict."""
    torch.manual_seed(1)
    inputs = case.inputs()
    try:
        errors = _errors(case, dense, pruned, graph, remove, inputs, torch.float64)
    except Exception as failure:
        errors = _errors(case, dense, pruned, graph, remove, inputs, torch.float32)
        errors["float64"] = f"{type(failure).__name__}: {failure}"[:200]
    best = min(errors.get(name, np.inf) for name in ORACLES)
    right = "right" if errors["effect"] > VISIBLE else "proof only"
    return {**errors, "verdict": right if best < TOLERANCE else "wrong"}


def _errors(
    case: Case,
    dense: nn.Module,
    pruned: nn.Module,
    graph: ChannelGraph,
    remove: Units,
    inputs: Any,
    dtype: Any,
) -> dict[str, Any]:
    inputs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
    actual = _Outputs(case, copy.deepcopy(pruned).to(dtype), inputs)
    errors: dict[str, Any] = {"effect": error(_Outputs(case, copy.deepcopy(dense).to(dtype), inputs), actual)}
    for name, oracle in ORACLES.items():
        reference = oracle(copy.deepcopy(dense).to(dtype), graph, remove)
        case.reference(reference)
        errors[name] = error(_Outputs(case, reference, inputs), actual)
        if errors[name] < TOLERANCE / 10:
            break
    return errors
