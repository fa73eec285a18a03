"""Which units matter least: criteria that score every unit (level 3).

A criterion is any callable ``(graph, model, statistics) -> importance``, shape (num_units,), lowest goes first; a
plain function or lambda will do. See :mod:`lightning_prune.criteria.reduction` for what else it may say of itself,
and ``docs/criteria.md`` for formulas, sources and options.
"""

from lightning_prune.criteria.activations import ActivationMean, MeanActivation
from lightning_prune.criteria.base import Criterion, Gatherer, Importance
from lightning_prune.criteria.cost_aware import CostAware, marginal_costs
from lightning_prune.criteria.gradients import Gradients, TaylorGate, TaylorWeight
from lightning_prune.criteria.ipad import IPAD, Deviation, ipad
from lightning_prune.criteria.propagated import Propagated, propagate
from lightning_prune.criteria.reduction import Normalise, Reduction, Scope, filter_norms, per_unit
from lightning_prune.criteria.weights import FPGM, L1, L2, LAMP, Norm, NormScale, Random
from lightning_prune.criteria.wrappers import Normalised, blind_to

__all__ = [
    "FPGM",
    "IPAD",
    "L1",
    "L2",
    "LAMP",
    "ActivationMean",
    "CostAware",
    "Criterion",
    "Deviation",
    "Gatherer",
    "Gradients",
    "Importance",
    "MeanActivation",
    "Norm",
    "NormScale",
    "Normalise",
    "Normalised",
    "Propagated",
    "Random",
    "Reduction",
    "Scope",
    "TaylorGate",
    "TaylorWeight",
    "blind_to",
    "filter_norms",
    "ipad",
    "marginal_costs",
    "per_unit",
    "propagate",
]
