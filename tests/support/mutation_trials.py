"""Try random cuts of a network under a planted fault, with the proof and without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_prune import ChannelGraph, SurgeryError, prune_, trace
from lightning_prune.surgery import prune as surgery
from lightning_prune.testing import error, with_dead_filters, with_zeroed_consumers
from tests.support.mutations import Plant
from tests.support.random_cuts import TOLERANCE, random_units, same_state, state

CUTS = [(seed, share) for seed in range(4) for share in (0.1, 0.4, 0.7)]
ORACLES = (with_dead_filters, with_zeroed_consumers)
EXAMPLE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Attributes:
        name: of the fault, for people.
        build: makes the network that shows it.
        plant: plants it.
        mixing: whether it concerns statistics over channels: the oracle is then the cut with correct rules.
        examples: on which cuts are compared; the network is traced on ``EXAMPLE``.
    """

    name: str
    build: Callable[[], nn.Module]
    plant: Plant
    mixing: bool = False
    examples: tuple[Tensor, ...] = (EXAMPLE,)

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


@dataclass
class Verdict:
    """Result of one random cut under a fault: what is wrong without the proof, and the error of the proof."""

    wrong: str
    refusal: str
    restored: bool


def _touched(truth: ChannelGraph, faulty: ChannelGraph, remove: np.ndarray) -> np.ndarray:
    """The correct units of the filters that the faulty graph removes."""
    kept = faulty.kept(remove)
    removed = [
        truth.layers[name][~kept[units]] for name, units in faulty.layers.items() if name in truth.layers
    ]
    return np.unique(np.concatenate([*removed, np.empty(0, np.int64)]))


def _unproven(fault: Fault, remove: np.ndarray, oracles: Sequence[nn.Module]) -> str:
    """Describe what is wrong with the faulty cut without the proof; empty if it is right.

    It is right if it equals the dense network without the correct units of the removed filters, or without only
    those parameters that the fault removes: a fault may tie too little, and still be right by chance.
    """
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        patch.setattr(surgery, "prove", lambda *args, **kwargs: None)
        model = fault.build()
        graph = trace(model, EXAMPLE)
        faulty_oracles = [] if fault.mixing else [zero(model, graph, remove) for zero in ORACLES]
        try:
            prune_(model, graph, remove)
        except Exception as raised:
            return f"raises {raised}"
    try:
        errors = [
            max(error(oracle, model, example) for example in fault.examples)
            for oracle in (*oracles, *faulty_oracles)
        ]
    except Exception as raised:
        return f"raises {raised}"
    correct = max(errors[: len(oracles)])
    faulty = max(errors[len(oracles) :], default=np.inf)
    return "" if min(correct, faulty) <= TOLERANCE else f"errors {errors}"


def try_cut(fault: Fault, seed: int, share: float) -> Verdict:
    """Make one random cut under a fault; the oracles are made without it."""
    right = fault.build()
    truth = trace(right, EXAMPLE)
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        model = fault.build()
        graph = trace(model, EXAMPLE)
        among = graph.prunable if fault.mixing else np.setdiff1d(graph.prunable, graph.statistics_units)
        remove = random_units(graph, np.random.default_rng(seed), share, among)
        before = state(model)
        try:
            prune_(model, graph, remove)
            refusal = ""
        except SurgeryError as refused:
            refusal = str(refused)
        restored = not refusal or same_state(before, state(model))
    touched = _touched(truth, graph, remove)
    oracles = [zero(right, truth, touched) for zero in ORACLES]
    if fault.mixing:
        prune_(right, truth, touched)
        oracles = [right]
    return Verdict(_unproven(fault, remove, oracles), refusal, restored)


def check_caught(fault: Fault) -> None:
    """Assert that some cuts are wrong under a fault, and that the proof refuses these and rolls them back."""
    verdicts = [try_cut(fault, seed, share) for seed, share in CUTS]
    wrong = [verdict for verdict in verdicts if verdict.wrong]
    assert wrong, "the fault makes no cut wrong: it needs another network"
    missed = [verdict.wrong for verdict in wrong if not verdict.refusal]
    assert not missed, f"{len(missed)} of {len(wrong)} wrong cuts were accepted: {missed[0]}"
    assert all(verdict.restored for verdict in verdicts)


def check_right(build: Callable[[], nn.Module]) -> None:
    """Assert that without a fault every cut is right and proven."""
    verdicts = [try_cut(Fault("none", build, lambda patch: None), seed, share) for seed, share in CUTS[:6]]
    assert [(verdict.wrong, verdict.refusal) for verdict in verdicts] == [("", "")] * len(verdicts)
