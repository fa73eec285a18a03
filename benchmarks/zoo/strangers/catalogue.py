"""All networks of the second zoo."""

from __future__ import annotations

from itertools import zip_longest

from benchmarks.zoo.strangers import audio, language, medical, transformers_vision, vision, vits, yolo
from benchmarks.zoo.strangers.case import Case

__all__ = ["catalogue"]


def catalogue() -> list[Case]:
    """Return all networks. The packages alternate, so that the beginning of the list is a sample of all."""
    modules = (vision, language, medical, transformers_vision, vits, yolo, audio)
    turns = zip_longest(*(list(module.cases()) for module in modules))
    return [case for turn in turns for case in turn if case is not None]
