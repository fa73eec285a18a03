"""Prune one candidate of a search, train it briefly and evaluate it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from lightning_prune.compensation.repair import compensate_
from lightning_prune.graph.trace import trace
from lightning_prune.netadapt.repair import RoundRepair
from lightning_prune.pruning.training import Training, step_
from lightning_prune.surgery.prune import prune_
from lightning_prune.utils.batch_norm import recalibrate_by_, tracked_norms
from lightning_prune.utils.example_inputs import Example, on_device
from lightning_prune.utils.modules import training_modes

__all__ = [
    "CALIBRATION_BATCHES",
    "Candidate",
    "CandidateContext",
    "CandidateResult",
    "compute_candidate",
    "rehearse_training",
]

#: least number of batches in a round, on which batch norms are estimated; a repaired candidate that is trained for
#: fewer batches keeps its norms
CALIBRATION_BATCHES = 4


@dataclass(frozen=True)
class CandidateContext:
    """The network that all candidates of a round start from, and how they are trained.

    Attributes:
        model: the network.
        example: positional and keyword inputs of its forward.
        training: how candidates are trained and evaluated.
        state: of the optimizer that candidates continue with; None: a new optimizer.
        steps: optimizer steps of each candidate.
        repair: repairs candidates before they are trained; None: they are not repaired.
    """

    model: nn.Module
    example: Example
    training: Training
    state: dict[str, Any] | None
    steps: int
    repair: RoundRepair | None = None


@dataclass(frozen=True)
class Candidate:
    """One candidate of a round.

    Attributes:
        index: among the candidates of its round.
        name: for messages.
        remove: units to remove, as the trace of the round's network numbers them. If there are none, the network is
            evaluated without training.
        seed: of all random numbers of the candidate.
    """

    index: int
    name: str
    remove: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class CandidateResult:
    """Metric and weights of a candidate, or the reason why it failed.

    Attributes:
        index: of the candidate.
        metric: of its evaluation; NaN if it failed.
        weights: its ``state_dict``, on the CPU.
        optimizer: state of its optimizer, on the CPU.
        error: why it failed, otherwise empty.
        change: of its outputs by the cut, without and with the repair; None if it was not repaired.
    """

    index: int
    metric: float = float("nan")
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    change: tuple[float, float] | None = None


def compute_candidate(
    context: CandidateContext, candidate: Candidate, device: torch.device
) -> CandidateResult:
    """Prune, train and evaluate one candidate. The network in ``context`` is changed.

    Raises:
        SurgeryError: the cut is refused.
    """
    training, model = context.training, context.model
    optimizer = training.optimizer(model)
    if context.state is not None:
        optimizer.load_state_dict(context.state)
    change = None
    if candidate.remove:
        change = _cut_(context, candidate, optimizer, device)
        _train_(model, optimizer, training, context.steps, device)
        # The norms of repaired layers fit them, unless many steps have changed the layers since.
        if change is None or context.steps * training.accumulate >= CALIBRATION_BATCHES:
            _recalibrate_(model, training, device)
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            return CandidateResult(
                candidate.index, error="a few steps of training made its weights NaN or infinite"
            )
    else:
        _move_(model, optimizer, device)
    metric = _evaluate(model, training)
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    state = _to_cpu(optimizer.state_dict())
    return CandidateResult(candidate.index, metric, weights, state, change=change)


def _cut_(
    context: CandidateContext, candidate: Candidate, optimizer: Optimizer, device: torch.device
) -> tuple[float, float] | None:
    """Prune the network, move it to ``device`` and repair it; return the change of its outputs, without and with.

    None if it was not repaired, or the repair was undone.
    """
    model, repair = context.model, context.repair
    graph = trace(model, *context.example[0], **context.example[1])
    targets = None if repair is None else repair.targets_of(model, graph, candidate.remove, device)
    prune_(model, graph, candidate.remove, [optimizer])
    _move_(model, optimizer, device)
    if repair is None or targets is None:
        return None
    report = compensate_(model, targets, repair.batches)
    return (report.change_before, report.change_after) if report.accepted else None


def rehearse_training(context: CandidateContext, device: torch.device) -> float:
    """Train the network in ``context`` for one step and evaluate it, so that errors show before the search.

    Returns:
        The metric.
    """
    model, training = context.model, context.training
    optimizer = training.optimizer(model)
    _move_(model, optimizer, device)
    step_(model, optimizer, training, on_device(training.batches, device))
    return _evaluate(model, training)


def _evaluate(model: nn.Module, training: Training) -> float:
    with torch.no_grad(), training_modes(model, lambda module: False):
        return float(training.evaluate(model))


def _train_(
    model: nn.Module, optimizer: Optimizer, training: Training, steps: int, device: torch.device
) -> None:
    """Train for a few steps."""
    stream = cycle([on_device(batch, device) for batch in training.batches])
    for _ in range(steps):
        step_(model, optimizer, training, list(islice(stream, training.accumulate)))
    optimizer.zero_grad()


def _recalibrate_(model: nn.Module, training: Training, device: torch.device) -> None:
    """Estimate batch norms on all batches, since a few steps do not renew them; those in eval mode stay."""
    norms = [norm for norm in tracked_norms(model) if norm.training or not model.training]
    batches = (on_device(batch, device) for batch in training.batches)
    recalibrate_by_(model, (partial(training.loss, model, batch) for batch in batches), norms)


def _to_cpu(state: Any) -> Any:
    """Return a copy of a state with its tensors on the CPU."""
    return tree_map_only(Tensor, lambda x: x.detach().cpu().clone(), copy.copy(state))


def _move_(model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
    model.to(device)
    # Loading the state moves it to the device of the parameters.
    optimizer.load_state_dict(optimizer.state_dict())
