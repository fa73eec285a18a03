"""One candidate of a search: cut, trained a little and judged (level 3)."""

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

from lightning_prune.graph.trace import trace
from lightning_prune.pruning.training import Training, on_device, step_
from lightning_prune.surgery.prune import prune_
from lightning_prune.utils.batch_norm import recalibrate_by_, tracked_norms
from lightning_prune.utils.example_inputs import Example
from lightning_prune.utils.modules import training_modes

__all__ = [
    "Candidate",
    "CandidateContext",
    "CandidateResult",
    "Training",
    "on_device",
    "rehearsed",
    "step_",
    "tried",
]


@dataclass(frozen=True)
class CandidateContext:
    """What all candidates of a round start from."""

    model: nn.Module
    example: Example
    training: Training
    state: dict[str, Any] | None
    steps: int


@dataclass(frozen=True)
class Candidate:
    """One of a round.

    Attributes:
        index: among the candidates of its round.
        name: for people.
        remove: units that go, as the trace of the round's network numbers them. None of them: nothing is trained
            either, the network is judged as it is.
        seed: of all that is random in it.
    """

    index: int
    name: str
    remove: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class CandidateResult:
    """What became of a candidate.

    Attributes:
        index: of the candidate.
        metric: of its evaluation; NaN if it failed.
        weights: its ``state_dict``, on the CPU.
        optimizer: state of its optimizer, on the CPU.
        error: why it failed, else empty.
    """

    index: int
    metric: float = float("nan")
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def tried(shared: CandidateContext, candidate: Candidate, device: torch.device) -> CandidateResult:
    """Cut, train and judge one candidate; what it was made from is used up.

    Raises:
        SurgeryError: the cut is refused.
    """
    training, model = shared.training, shared.model
    optimizer = training.optimizer(model)
    if shared.state is not None:
        optimizer.load_state_dict(shared.state)
    if candidate.remove:
        graph = trace(model, *shared.example[0], **shared.example[1])
        prune_(model, graph, candidate.remove, [optimizer])
    _move(model, optimizer, device)
    if candidate.remove:
        _tune(model, optimizer, training, shared.steps, device)
        if not all(bool(p.isfinite().all()) for p in model.parameters()):
            return CandidateResult(
                candidate.index, error="a few steps of training made its weights NaN or infinite"
            )
    metric = _judged(model, training)
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return CandidateResult(candidate.index, metric, weights, on_cpu(optimizer.state_dict()))


def rehearsed(shared: CandidateContext, device: torch.device) -> float:
    """One step and one evaluation as candidates have them, of a network that nobody keeps: what fails fails now."""
    model, training = shared.model, shared.training
    optimizer = training.optimizer(model)
    _move(model, optimizer, device)
    step_(model, optimizer, training, on_device(training.batches, device))
    return _judged(model, training)


def _judged(model: nn.Module, training: Training) -> float:
    with torch.no_grad(), training_modes(model, lambda module: False):
        return float(training.evaluate(model))


def _tune(
    model: nn.Module, optimizer: Optimizer, training: Training, steps: int, device: torch.device
) -> None:
    """A few steps of training; batch norms then see all of the batches again, since few steps do not renew them.

    Norms that are kept in eval mode keep their statistics too.
    """
    batches = [on_device(batch, device) for batch in training.batches]
    stream = cycle(batches)
    for _ in range(steps):
        step_(model, optimizer, training, list(islice(stream, training.accumulate)))
    optimizer.zero_grad()
    norms = [norm for norm in tracked_norms(model) if norm.training or not model.training]
    recalibrate_by_(model, (partial(training.loss, model, batch) for batch in batches), norms)


def on_cpu(state: Any) -> Any:
    """A copy of a state, its tensors on the CPU."""
    return tree_map_only(Tensor, lambda x: x.detach().cpu().clone(), copy.copy(state))


def _move(model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
    model.to(device)
    optimizer.load_state_dict(optimizer.state_dict())  # which moves it to its parameters
