"""One candidate of a search: cut, trained a little and judged (level 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from lightning_prune.batches import Example, recalibrate_by_, switched, tracked_norms
from lightning_prune.surgery import prune_
from lightning_prune.tracing import trace

__all__ = ["Candidate", "Outcome", "Shared", "Training", "adam", "on_device", "rehearsed", "step_", "tried"]


def adam(net: nn.Module) -> Optimizer:
    """Adam at 1e-3 over what requires gradients."""
    return torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)


@dataclass(frozen=True)
class Training:
    """How candidates are trained, and judged. Everything must survive cloudpickle; lambdas do.

    Attributes:
        batches: of the training data; candidates take them in turn, always the same ones in the same round.
        loss: ``(network, batch) -> loss``, a scalar with gradient; None: this batch is skipped.
        evaluate: ``network -> metric`` on data that no candidate was trained on; the network is in eval mode.
        optimizer: makes the optimizer of a network; the same parameters in the same order each time.
        higher_is_better: of the metric.
        accumulate: batches for each step, whose mean loss counts.
        before_step: ``(network, optimizer)``: what is done to the gradients before each step; clips them, say.
    """

    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], Tensor | None]
    evaluate: Callable[[nn.Module], float]
    optimizer: Callable[[nn.Module], Optimizer] = adam
    higher_is_better: bool = True
    accumulate: int = 1
    before_step: Callable[[nn.Module, Optimizer], None] | None = None


@dataclass(frozen=True)
class Shared:
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
class Outcome:
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


def tried(shared: Shared, candidate: Candidate, device: torch.device) -> Outcome:
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
            return Outcome(candidate.index, error="a few steps of training made its weights NaN or infinite")
    metric = _judged(model, training)
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return Outcome(candidate.index, metric, weights, on_cpu(optimizer.state_dict()))


def rehearsed(shared: Shared, device: torch.device) -> float:
    """One step and one evaluation as candidates have them, of a network that nobody keeps: what fails fails now."""
    model, training = shared.model, shared.training
    optimizer = training.optimizer(model)
    _move(model, optimizer, device)
    step_(model, optimizer, training, on_device(training.batches, device))
    return _judged(model, training)


def _judged(model: nn.Module, training: Training) -> float:
    with torch.no_grad(), switched(model, lambda module: False):
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


def step_(model: nn.Module, optimizer: Optimizer, training: Training, batches: Sequence[Any]) -> None:
    """One step on the mean loss of ``batches``; none if there is no loss."""
    optimizer.zero_grad()
    seen = 0
    for batch in batches:
        loss = training.loss(model, batch)
        if loss is not None:
            (loss / len(batches)).backward()
            seen += 1
    if seen:
        if training.before_step is not None:
            training.before_step(model, optimizer)
        optimizer.step()


def on_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch, on a device."""
    return tree_map_only(Tensor, lambda x: x.to(device), batch)


def on_cpu(state: Any) -> Any:
    """A copy of a state, its tensors on the CPU."""
    return tree_map_only(Tensor, lambda x: x.detach().cpu().clone(), copy.copy(state))


def _move(model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
    model.to(device)
    optimizer.load_state_dict(optimizer.state_dict())  # which moves it to its parameters
