"""The rules: one small function per ATen operator, in a registry (level 1)."""

from lightning_prune.tracing.rules import concatenation as joining
from lightning_prune.tracing.rules import contractions as contraction
from lightning_prune.tracing.rules import expansion as repetition
from lightning_prune.tracing.rules import normalization as normalisation
from lightning_prune.tracing.rules import permutation as movement
from lightning_prune.tracing.rules import pointwise, reshape
from lightning_prune.tracing.rules import rearrangement as regrouping
from lightning_prune.tracing.rules import splitting as parts
from lightning_prune.tracing.rules.registry import RULES, Rule, follow, rule, same_labels

__all__ = [
    "RULES",
    "Rule",
    "contraction",
    "follow",
    "joining",
    "movement",
    "normalisation",
    "parts",
    "pointwise",
    "regrouping",
    "repetition",
    "reshape",
    "rule",
    "same_labels",
]
