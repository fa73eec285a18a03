"""Network slimming: a sparsity penalty on the scales of norms, and the removal of channels with small scales.

Method: Liu et al., ICCV 2017, with the cost-weighted penalty of AtomNAS (Mei et al., ICLR 2020).
"""

from lightning_prune.slimming.bias_folding import fold_
from lightning_prune.slimming.contributions import shifts
from lightning_prune.slimming.penalty import Penalty, channel_costs, slimmable
from lightning_prune.slimming.policy import SlimmingPolicy

__all__ = [
    "Penalty",
    "SlimmingPolicy",
    "channel_costs",
    "fold_",
    "shifts",
    "slimmable",
]
