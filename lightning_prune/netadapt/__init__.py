"""NetAdapt: search a small network in rounds of candidates that are cut and trained briefly.

Yang et al., ECCV 2018, arXiv 1804.03230.
"""

from lightning_prune.netadapt.rounds import Round, Rounds, SearchResult
from lightning_prune.netadapt.run import search
from lightning_prune.netadapt.workers import Workers
from lightning_prune.pruning.training import Training

__all__ = [
    "Round",
    "Rounds",
    "SearchResult",
    "Training",
    "Workers",
    "search",
]
