"""Candidates of a search: each cut, trained a little and judged, in parallel processes (level 3).

A candidate's result follows from what it is given and its seed alone: whoever computes it, on one thread or on the
other side of a cluster, gets the same numbers from the same kind of device.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from typing import Any

import cloudpickle
import numpy as np
import torch
from joblib import Parallel, delayed
from joblib.parallel import get_active_backend
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from lightning_prune.batches import Example, recalibrate_by_, switched, tracked_norms
from lightning_prune.randomness import seeded
from lightning_prune.surgery import SurgeryError, prune_
from lightning_prune.tracing import trace

__all__ = ["Candidate", "Outcome", "Training", "Workers", "adam", "packed", "rehearse", "run"]

Pack = NDArray[np.uint8]


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
class Workers:
    """Where candidates are computed.

    Args:
        n_jobs: processes, as joblib counts them: -1 for one per core. ``None``: one per entry of ``devices``,
            else what an enclosing ``joblib.parallel_config`` says, else 1, which is this process itself.
        devices: of the candidates, in turn: ``[0, 0, 1]`` has two at a time on the first GPU and one on the
            second; names as torch knows them will do. ``None``: the CPU.
        threads: that each worker computes with on the CPU.

    Raises:
        ValueError: a number is out of range, or a device is not there.

    Example:
        >>> Workers(devices=["cpu", "cpu"]).number, Workers().number
        (2, 1)
    """

    n_jobs: int | None = None
    devices: Sequence[int | str] | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if self.n_jobs == 0 or self.threads < 1 or (self.devices is not None and not len(self.devices)):
            raise ValueError(
                "need n_jobs other than 0, at least one thread and one device, got "
                f"{self.n_jobs}, {self.threads} and {self.devices}"
            )
        for device in self.devices or ():
            if not _is_there(torch.device(device)):
                raise ValueError(
                    f"device {device!r} is not there; torch sees {torch.cuda.device_count()} GPUs"
                )

    @property
    def number(self) -> int:
        """Processes that compute at the same time."""
        if self.n_jobs is None and self.devices:
            return len(self.devices)
        return Parallel(n_jobs=self.n_jobs, prefer="processes")._effective_n_jobs()

    def device(self, index: int) -> torch.device:
        """Of the candidate with this number."""
        return torch.device(self.devices[index % len(self.devices)] if self.devices else "cpu")


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


def packed(shared: Shared) -> Pack:
    """As bytes in an array, which joblib keeps in shared memory; a candidate never touches the original."""
    return np.frombuffer(cloudpickle.dumps(shared), np.uint8)


def attempt(pack: Pack, candidate: Candidate, device: torch.device, threads: int) -> Outcome:
    """Cut, train and judge one candidate."""
    with _threads(threads), seeded(candidate.seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the user's loss, said in every training step anyhow
        shared: Shared = cloudpickle.loads(pack.data)
        try:
            return _compute(shared, candidate, device)
        except (SurgeryError, torch.OutOfMemoryError) as error:
            return Outcome(candidate.index, error=f"{type(error).__name__}: {error}")


def rehearse(pack: Pack, device: torch.device) -> float:
    """One step and one evaluation as candidates have them, of a network that nobody keeps: what fails fails now."""
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shared: Shared = cloudpickle.loads(pack.data)
        optimizer = shared.training.optimizer(shared.model)
        _move(shared.model, optimizer, device)
        step_(shared.model, optimizer, shared.training, on_device(shared.training.batches, device))
        return _judged(shared.model, shared.training)


def run(pack: Pack, candidates: Sequence[Candidate], workers: Workers) -> Iterator[Outcome]:
    """The outcomes of all candidates, in the order in which they are ready.

    A process that dies takes the others of its pool along. Whatever has no outcome then is tried once more, alone;
    what dies again is dropped with a warning.
    """
    waiting = {candidate.index: candidate for candidate in candidates}
    yield from _wave(pack, candidates, waiting, workers)
    for candidate in list(waiting.values()):
        yield from _wave(pack, [candidate], waiting, workers)
        if candidate.index in waiting:
            yield Outcome(candidate.index, error="its process died twice")


def _wave(
    pack: Pack, candidates: Sequence[Candidate], waiting: dict[int, Candidate], workers: Workers
) -> Iterator[Outcome]:
    """Those that come to an end; ``waiting`` keeps the others."""
    jobs = [(pack, each, workers.device(each.index), workers.threads) for each in candidates]
    try:
        for outcome in _outcomes(jobs, workers.number):
            del waiting[outcome.index]
            yield outcome
    except _deaths() as error:
        names = ", ".join(candidate.name for candidate in waiting.values())
        warnings.warn(f"a worker died ({type(error).__name__}); without a result: {names}", stacklevel=3)


def _outcomes(jobs: Sequence[tuple[Any, ...]], number: int) -> Iterable[Outcome]:
    """In this process if there is but one; else in joblib's, which must be processes: generators are global."""
    backend, _ = get_active_backend(prefer="processes")
    if number == 1 or getattr(backend, "supports_sharedmem", False):
        return (attempt(*job) for job in jobs)
    order = "generator_unordered" if backend.supports_return_generator else "list"
    parallel = Parallel(n_jobs=number, prefer="processes", batch_size=1, return_as=order)
    return parallel(delayed(attempt)(*job) for job in jobs)


def _deaths() -> tuple[type[BaseException], ...]:
    """What the back ends raise when a worker is gone, as opposed to what a candidate raises."""
    found: list[type[BaseException]] = [BrokenProcessPool]
    if "ray" in sys.modules:
        from ray.exceptions import RayActorError, WorkerCrashedError

        found += [RayActorError, WorkerCrashedError]
    if "distributed" in sys.modules:
        from distributed import KilledWorker

        found.append(KilledWorker)
    return tuple(found)


def _compute(shared: Shared, candidate: Candidate, device: torch.device) -> Outcome:
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


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_there(device: torch.device) -> bool:
    return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()
