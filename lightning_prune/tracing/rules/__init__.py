"""Rules that follow channels through ATen operators: one small function per operator, kept in a registry."""

# Importing a module registers its rules.
from lightning_prune.tracing.rules import (
    concatenation,
    contractions,
    expansion,
    normalization,
    permutation,
    pointwise,
    positions,
    quantization,
    rearrangement,
    reshape,
    splitting,
    vision,
)
from lightning_prune.tracing.rules.registry import RULES, Rule, apply_rule, rule, same_labels

__all__ = [
    "RULES",
    "Rule",
    "apply_rule",
    "concatenation",
    "contractions",
    "expansion",
    "normalization",
    "permutation",
    "pointwise",
    "positions",
    "quantization",
    "rearrangement",
    "reshape",
    "rule",
    "same_labels",
    "splitting",
    "vision",
]
