"""From scores of filters to importance of units: reduction, scope, normalisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from lightning_prune.criteria.base import Importance, Values
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.tracing.ids import Units
from lightning_prune.utils.arguments import check_choice
from lightning_prune.utils.modules import stored_tensor

__all__ = ["Importance", "Normalise", "Reduction", "Scope", "per_unit", "reduced"]

Reduction = Literal["mean", "sum", "max"]
Normalise = Literal["none", "layer", "group", "global", "remaining"]
Scope = Literal["filters", "bound"]
#: one value per filter, by the qualified name of the weight
PerFilter = Mapping[str, Values]
#: unit and score of each index along one dimension of one tensor
Piece = tuple[Units, Values]


def groups(graph: ChannelGraph) -> Units:
    """Return the group of each unit, shape (num_units,): units whose filters lie in one layer, or in coupled layers.

    Example:
        >>> layers = {"a": np.array([0, 1]), "b": np.array([1, 2]), "c": np.array([3])}
        >>> groups(ChannelGraph(4, {}, layers, dict.fromkeys(layers, 0), {}, {})).tolist()
        [0, 0, 0, 1]
    """
    nothing = np.empty(0, np.int64)
    layers = [nothing, *graph.layers.values()]
    first = np.concatenate([np.repeat(units[:1], len(units)) for units in layers])
    pairs = (np.ones(len(first)), (first, np.concatenate(layers)))
    return connected_components(csr_matrix(pairs, shape=(graph.num_units,) * 2), directed=False)[1]


def by_mean(values: Values, labels: Units | None = None) -> Values:
    """Divide finite values by their mean, separately for each label; leave them unchanged where the mean is 0.

    Example:
        >>> by_mean(np.array([1.0, 3.0, np.inf]))
        array([0.5, 1.5, inf])
    """
    labels = np.zeros(len(values), np.int64) if labels is None else labels
    finite = np.isfinite(values)
    number = np.maximum(np.bincount(labels[finite], minlength=1 + int(labels.max(initial=0))), 1)
    total = np.bincount(labels[finite], weights=values[finite], minlength=len(number))
    mean = total / number
    return values / np.where(mean == 0, 1.0, mean)[labels]


def share_of_larger(values: Values) -> Values:
    """Divide each value by the sum of those that are not smaller; the largest gets 1. Ties are broken by position.

    The normalisation of LAMP (Lee et al., ICLR 2021).

    Example:
        >>> share_of_larger(np.array([1.0, 4.0, 3.0]))
        array([0.125     , 1.        , 0.42857143])
    """
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    larger = np.cumsum(ascending[::-1])[::-1]
    scores = np.empty_like(ascending)
    scores[order] = ascending / np.where(larger == 0, 1.0, larger)
    return scores


def remaining_shares(graph: ChannelGraph, importance: Importance, beta: float = 0.5) -> Importance:
    """Return what each unit carries of what would remain of its group, times ``|group| ** beta``.

    The share of a unit in the sum over the units of its group of coupled layers that are at least as important
    (LAMP's normalisation): it rises while a group shrinks, so no group is emptied. Of groups whose units are equally
    important, all keep the same share of their units with beta 1, and the same number of them with beta 0.

    Args:
        graph: the units.
        importance: not negative, shape (num_units,); infinite values stay.
        beta: in [0, 1].

    Example:
        >>> layers = {"a": np.array([0, 1, 2, 3]), "b": np.array([4])}
        >>> graph = ChannelGraph(5, {}, layers, {"a": 0, "b": 0}, {}, {})
        >>> remaining_shares(graph, np.ones(5), beta=1.0)
        array([1.        , 1.33333333, 2.        , 4.        , 1.        ])
    """
    labels, scores = groups(graph), importance.copy()
    finite = np.isfinite(importance)
    for label in np.unique(labels[finite]):
        units = np.flatnonzero((labels == label) & finite)
        scores[units] = share_of_larger(importance[units]) * len(units) ** beta
    return scores


def normalised(graph: ChannelGraph, importance: Importance, by: Normalise) -> Importance:
    """Divide the importance of units by the mean over their group, or over the network.

    ``"layer"`` is the mean over the layers that a unit has filters in, each as multiples of its own mean;
    ``"remaining"`` is :func:`remaining_shares`.

    Example:
        >>> layers = {"a": np.array([0, 1]), "b": np.array([2])}
        >>> graph = ChannelGraph(3, {}, layers, {"a": 0, "b": 0}, {}, {})
        >>> normalised(graph, np.array([1.0, 3.0, 9.0]), "group")
        array([0.5, 1.5, 1. ])
    """
    check_choice("normalise", by, get_args(Normalise))
    if by == "layer":
        return reduced(graph, [(units, importance[units]) for units in graph.layers.values()], "mean", by)
    if by == "remaining":
        return remaining_shares(graph, importance)
    if by == "group":
        return by_mean(importance, groups(graph))
    return by_mean(importance) if by == "global" else importance


def reduced(
    graph: ChannelGraph,
    pieces: Iterable[Piece],
    reduction: Reduction = "mean",
    normalise: Normalise = "none",
) -> Importance:
    """Reduce scores of slices of tensors to scores of units, over the slices that go together.

    Args:
        graph: says how many units there are, and which belong together.
        pieces: unit and score of each slice, for each tensor.
        reduction: ``"mean"``, ``"sum"`` or ``"max"``.
        normalise: ``"layer"`` divides each piece by its mean first, ``"group"`` and ``"global"`` units by the mean
            over their group or the network afterwards, ``"remaining"`` takes :func:`remaining_shares`.

    Returns:
        Shape (num_units,); infinite (never the least important) for units without a score.

    Raises:
        ValueError: an unknown reduction or normalisation.
    """
    check_choice("reduction", reduction, get_args(Reduction))
    check_choice("normalise", normalise, get_args(Normalise))
    pieces = [(units, by_mean(values) if normalise == "layer" else values) for units, values in pieces]
    units = np.concatenate([units for units, _ in pieces] or [np.empty(0, np.int64)])
    values = np.concatenate([values for _, values in pieces] or [np.empty(0)])
    number = np.bincount(units, minlength=graph.num_units)
    if reduction == "max":
        out = np.full(graph.num_units, -np.inf)
        np.maximum.at(out, units, values)
    else:
        out = np.bincount(units, weights=values, minlength=graph.num_units)
        out = out / np.maximum(number, 1) if reduction == "mean" else out
    out = np.where(number > 0, out, np.inf)
    return out if normalise == "layer" else normalised(graph, out, normalise)


def per_unit(
    graph: ChannelGraph, scores: PerFilter, reduction: Reduction = "mean", normalise: Normalise = "none"
) -> Importance:
    """Reduce scores of filters to scores of units, over the filters that go together.

    Args:
        graph: says which filters belong to which unit.
        scores: qualified name of a weight -> score per filter; layers may be missing.
        reduction: ``"mean"``, ``"sum"`` or ``"max"``.
        normalise: see :func:`reduced`.

    Returns:
        Shape (num_units,); infinite (never the least important) for units without a scored filter.

    Example:
        >>> layers = {"a": np.array([0, 1]), "b": np.array([1, 0])}
        >>> graph = ChannelGraph(3, {}, layers, {"a": 0, "b": 0}, {}, {})
        >>> per_unit(graph, {"a": np.array([1.0, 2.0]), "b": np.array([4.0, 3.0])})
        array([ 2.,  3., inf])
    """
    return reduced(graph, [(graph.layers[name], scores[name]) for name in scores], reduction, normalise)


def in_scope(graph: ChannelGraph, model: nn.Module, scope: Scope) -> Iterator[tuple[str, int, Units]]:
    """Yield the slices of parameters by which units are scored: name, dimension, unit of each index.

    ``"filters"``: those of its layers (IPAD). ``"bound"``: also norm scales and the input slices of whatever reads
    it, as Torch-Pruning's ``GroupMagnitudeImportance`` (Fang et al., CVPR 2023); no biases there either.
    """
    check_choice("scope", scope, get_args(Scope))
    if scope == "filters":
        yield from ((name, graph.filter_dims[name], units) for name, units in graph.layers.items())
        return
    parameters = dict(model.named_parameters())
    for name, dims in graph.bindings.items():
        if name in parameters and not name.rpartition(".")[2].startswith("bias"):
            yield from ((name, dim, units) for dim, units in dims.items())


def rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the slices along ``dim`` as rows, in float32 at least: shape (size of dim, rest)."""
    moved = tensor.detach().movedim(dim, 0).reshape(tensor.shape[dim], -1)
    return moved.to(torch.promote_types(moved.dtype, torch.float32))


def plain(values: torch.Tensor) -> Values:
    """Return a float64 array on the CPU; numpy has no bfloat16."""
    return values.detach().cpu().double().numpy()


def filter_norms(graph: ChannelGraph, model: nn.Module, p: int = 1) -> dict[str, Values]:
    """Return the p-norm of every filter of every layer: ``||W_k||_p`` over everything but the filters' dimension.

    Args:
        graph: the graph of ``model``.
        model: the traced module.
        p: order of the norm.

    Returns:
        Qualified name of each weight -> norms, shape (filters,).

    Example:
        >>> graph = ChannelGraph(1, {}, {"weight": np.array([0])}, {"weight": 0}, {}, {})
        >>> model = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        >>> filter_norms(graph, model, p=2)
        {'weight': array([5.])}
    """
    return {name: norms(model.get_parameter(name), graph.filter_dims[name], p) for name in graph.layers}


def norms(weight: torch.Tensor, dim: int, p: int) -> Values:
    """Return the p-norm of each slice along ``dim``."""
    return plain(torch.linalg.vector_norm(rows(weight, dim), p, dim=1))


def norm_scales(graph: ChannelGraph, model: nn.Module) -> dict[str, Units]:
    """Return the scales (gamma) of norms: qualified name -> unit of each channel.

    Batch, instance, group, layer and RMS norms with one learnt scale per channel.
    """
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    weights = [stored_tensor(m, "weight") for m in model.modules() if isinstance(m, kinds)]
    scales = {id(weight) for weight in weights if weight is not None}
    return {
        name: graph.bindings[name][0]
        for name, parameter in model.named_parameters()
        if id(parameter) in scales and parameter.dim() == 1 and 0 in graph.bindings.get(name, {})
    }
