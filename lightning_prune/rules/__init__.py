"""The rules: one small function per ATen operator, in a registry (level 1)."""

from lightning_prune.rules import (
    contraction,
    joining,
    movement,
    normalisation,
    parts,
    pointwise,
    regrouping,
    repetition,
    reshape,
)
from lightning_prune.rules.registry import RULES, Rule, follow, rule, same_labels

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
