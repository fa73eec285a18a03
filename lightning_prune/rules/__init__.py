"""The rules: one small function per ATen operator, in a registry (level 1)."""

from lightning_prune.rules import contraction, movement, normalisation, parts, pointwise, reshape
from lightning_prune.rules.registry import RULES, Rule, follow, rule, same_labels

__all__ = [
    "RULES",
    "Rule",
    "contraction",
    "follow",
    "movement",
    "normalisation",
    "parts",
    "pointwise",
    "reshape",
    "rule",
    "same_labels",
]
