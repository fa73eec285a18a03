"""Compute the candidates of a search in parallel processes.

The result of a candidate depends only on its inputs and its seed. Every worker, in this process or on another machine
of a cluster, computes the same numbers on the same kind of device.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import torch
from joblib import Parallel, delayed
from joblib.parallel import get_active_backend
from numpy.typing import NDArray

from lightning_prune.compensation.calibration import CompensationError
from lightning_prune.netadapt.candidate import (
    Candidate,
    CandidateContext,
    CandidateResult,
    compute_candidate,
    rehearse_training,
)
from lightning_prune.pruning.training import Training, adam
from lightning_prune.surgery.prune import SurgeryError
from lightning_prune.utils.passing import PassingFailure, on_all
from lightning_prune.utils.seeding import seeded

__all__ = [
    "Candidate",
    "CandidateContext",
    "CandidateResult",
    "Training",
    "Workers",
    "adam",
    "attempt_candidate",
    "num_threads",
    "pack_context",
    "rehearse",
    "run_candidates",
]

#: a pickled :class:`CandidateContext`
PackedContext = NDArray[np.uint8]


@dataclass(frozen=True)
class Workers:
    """Processes and devices that compute candidates.

    Args:
        n_jobs: number of processes as in joblib: -1 for one per core. ``None``: one per entry of ``devices``,
            otherwise what an enclosing ``joblib.parallel_config`` says, otherwise 1, which is this process itself.
        devices: of the candidates, in turn: ``[0, 0, 1]`` computes two at a time on the first GPU and one on the
            second; names as in torch are possible, too. ``None``: the CPU.
        threads: of each worker on the CPU.

    Raises:
        ValueError: a number is out of range, or a device does not exist.

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
                f"n_jobs={self.n_jobs}, threads={self.threads} and devices={self.devices}"
            )
        for device in self.devices or ():
            if not _exists(torch.device(device)):
                raise ValueError(
                    f"device {device!r} does not exist; torch finds {torch.cuda.device_count()} GPUs"
                )

    @property
    def number(self) -> int:
        """Number of processes that compute at the same time."""
        if self.n_jobs is None and self.devices:
            return len(self.devices)
        return Parallel(n_jobs=self.n_jobs, prefer="processes")._effective_n_jobs()

    def device(self, index: int) -> torch.device:
        """Return the device of the candidate with this index."""
        return torch.device(self.devices[index % len(self.devices)] if self.devices else "cpu")


def _exists(device: torch.device) -> bool:
    return device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()


def pack_context(context: CandidateContext) -> PackedContext:
    """Pickle a context into an array, which joblib keeps in shared memory; each candidate unpacks its own copy."""
    return np.frombuffer(cloudpickle.dumps(context), np.uint8)


def attempt_candidate(
    context: PackedContext, candidate: Candidate, device: torch.device, threads: int
) -> CandidateResult:
    """Compute one candidate; the result says so if its cut is refused or the GPU has too little memory."""
    with num_threads(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user's loss gives the same warnings in the training itself
        try:
            # Tried twice: a lack of memory may pass. Each attempt begins with its own copy and the same seed.
            return on_all(lambda: _compute(context, candidate, device))
        except (SurgeryError, CompensationError, PassingFailure) as error:
            return CandidateResult(candidate.index, error=f"{type(error).__name__}: {error}")


def _compute(context: PackedContext, candidate: Candidate, device: torch.device) -> CandidateResult:
    with seeded(candidate.seed):
        return compute_candidate(cloudpickle.loads(context.data), candidate, device)


def rehearse(context: PackedContext, device: torch.device) -> float:
    """Train a copy for one step and evaluate it, without warnings and without a change to random generators.

    Returns:
        The metric; see :func:`~lightning_prune.netadapt.candidate.rehearse_training`.
    """
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rehearse_training(cloudpickle.loads(context.data), device)


def run_candidates(
    context: PackedContext, candidates: Sequence[Candidate], workers: Workers
) -> Iterator[CandidateResult]:
    """Yield the results of all candidates, in the order in which they are ready.

    If a process dies, the pool stops all its other processes. Each candidate that has no result then is computed once
    more on its own; if its process dies again, its result is an error.
    """
    pending = {candidate.index: candidate for candidate in candidates}
    yield from _run_pool(context, candidates, pending, workers)
    for candidate in list(pending.values()):
        yield from _run_pool(context, [candidate], pending, workers)
        if candidate.index in pending:
            yield CandidateResult(candidate.index, error="its process died twice")


def _run_pool(
    context: PackedContext, candidates: Sequence[Candidate], pending: dict[int, Candidate], workers: Workers
) -> Iterator[CandidateResult]:
    """Yield results until a process dies, and remove the candidates that have one from ``pending``."""
    jobs = [
        (context, candidate, workers.device(candidate.index), workers.threads) for candidate in candidates
    ]
    try:
        for result in _run_jobs(jobs, workers.number):
            del pending[result.index]
            yield result
    except _process_errors() as error:
        names = ", ".join(candidate.name for candidate in pending.values())
        warnings.warn(f"a worker died ({type(error).__name__}); without a result: {names}", stacklevel=3)


def _run_jobs(jobs: Sequence[tuple[Any, ...]], number: int) -> Iterable[CandidateResult]:
    """Run jobs in this process if there is one worker, otherwise by joblib.

    Threads are not used, since they share the global random generators.
    """
    backend, _ = get_active_backend(prefer="processes")
    if number == 1 or getattr(backend, "supports_sharedmem", False):
        return (attempt_candidate(*job) for job in jobs)
    order = "generator_unordered" if backend.supports_return_generator else "list"
    parallel = Parallel(n_jobs=number, prefer="processes", batch_size=1, return_as=order)
    return parallel(delayed(attempt_candidate)(*job) for job in jobs)


def _process_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions that joblib's back ends raise if a process died, unlike those that a candidate raises."""
    errors: list[type[BaseException]] = [BrokenProcessPool]
    if "ray" in sys.modules:
        from ray.exceptions import RayActorError, WorkerCrashedError

        errors += [RayActorError, WorkerCrashedError]
    if "distributed" in sys.modules:
        from distributed import KilledWorker

        errors.append(KilledWorker)
    return tuple(errors)


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    """Run a block with as many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
