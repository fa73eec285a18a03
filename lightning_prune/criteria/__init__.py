"""Criteria: score every unit of a graph; the lowest scores are removed first.

A criterion is a plain function ``(graph, model, statistics) -> importance`` of shape (num_units,), or a
:class:`Criterion`, which also says by ``observer(graph, model)`` what has to be observed during training.
"""

from lightning_prune.criteria.activation_deviation import ActivationDeviation
from lightning_prune.criteria.activations import ActivationMean, MeanActivation
from lightning_prune.criteria.base import (
    NO_STATISTICS,
    Criterion,
    CriterionLike,
    FunctionCriterion,
    Importance,
    Observer,
    ObservesNothing,
    Statistics,
    as_criterion,
)
from lightning_prune.criteria.channel_variance import ChannelVariance
from lightning_prune.criteria.collector import Collector
from lightning_prune.criteria.consumers import ConsumerInputs
from lightning_prune.criteria.cost_aware import CostAware, marginal_costs
from lightning_prune.criteria.energy import OutputEnergy, output_energy, weight_energy
from lightning_prune.criteria.gradients import Gradients, TaylorGate, TaylorWeight
from lightning_prune.criteria.ipad import IPAD, Deviation, energy_importance, ipad_importance
from lightning_prune.criteria.output_gradients import OutputGradients, OutputTaylor
from lightning_prune.criteria.propagated import Propagated, propagate
from lightning_prune.criteria.reduction import (
    Normalise,
    Reduction,
    Scope,
    filter_norms,
    per_unit,
    remaining_shares,
)
from lightning_prune.criteria.weights import FPGM, L1, L2, LAMP, Norm, NormScale, Random
from lightning_prune.criteria.wrappers import Normalised, blind_to

__all__ = [
    "FPGM",
    "IPAD",
    "L1",
    "L2",
    "LAMP",
    "NO_STATISTICS",
    "ActivationDeviation",
    "ActivationMean",
    "ChannelVariance",
    "Collector",
    "ConsumerInputs",
    "CostAware",
    "Criterion",
    "CriterionLike",
    "Deviation",
    "FunctionCriterion",
    "Gradients",
    "Importance",
    "MeanActivation",
    "Norm",
    "NormScale",
    "Normalise",
    "Normalised",
    "Observer",
    "ObservesNothing",
    "OutputEnergy",
    "OutputGradients",
    "OutputTaylor",
    "Propagated",
    "Random",
    "Reduction",
    "Scope",
    "Statistics",
    "TaylorGate",
    "TaylorWeight",
    "as_criterion",
    "blind_to",
    "energy_importance",
    "filter_norms",
    "ipad_importance",
    "marginal_costs",
    "output_energy",
    "per_unit",
    "propagate",
    "remaining_shares",
    "weight_energy",
]
