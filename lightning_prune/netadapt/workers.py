"""Candidates of a search in parallel processes (level 3).

A candidate's result follows from what it is given and its seed alone: whoever computes it, on one thread or on the
other side of a cluster, gets the same numbers from the same kind of device.
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

from lightning_prune.netadapt.candidate import Candidate, CandidateContext, CandidateResult, rehearsed, tried
from lightning_prune.pruning.training import Training, adam
from lightning_prune.surgery.prune import SurgeryError
from lightning_prune.utils.seeding import seeded

__all__ = [
    "Candidate",
    "CandidateContext",
    "CandidateResult",
    "Training",
    "Workers",
    "adam",
    "packed",
    "rehearse",
    "run",
]

Pack = NDArray[np.uint8]


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


def packed(shared: CandidateContext) -> Pack:
    """As bytes in an array, which joblib keeps in shared memory; a candidate never touches the original."""
    return np.frombuffer(cloudpickle.dumps(shared), np.uint8)


def attempt(pack: Pack, candidate: Candidate, device: torch.device, threads: int) -> CandidateResult:
    """Cut, train and judge one candidate."""
    with _threads(threads), seeded(candidate.seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the user's loss, said in every training step anyhow
        try:
            return tried(cloudpickle.loads(pack.data), candidate, device)
        except (SurgeryError, torch.OutOfMemoryError) as error:
            return CandidateResult(candidate.index, error=f"{type(error).__name__}: {error}")


def rehearse(pack: Pack, device: torch.device) -> float:
    """:func:`~lightning_prune.netadapt.candidate.rehearsed` without warnings, and with random numbers of its own."""
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rehearsed(cloudpickle.loads(pack.data), device)


def run(pack: Pack, candidates: Sequence[Candidate], workers: Workers) -> Iterator[CandidateResult]:
    """The outcomes of all candidates, in the order in which they are ready.

    A process that dies takes the others of its pool along. Whatever has no outcome then is tried once more, alone;
    what dies again is dropped with a warning.
    """
    waiting = {candidate.index: candidate for candidate in candidates}
    yield from _wave(pack, candidates, waiting, workers)
    for candidate in list(waiting.values()):
        yield from _wave(pack, [candidate], waiting, workers)
        if candidate.index in waiting:
            yield CandidateResult(candidate.index, error="its process died twice")


def _wave(
    pack: Pack, candidates: Sequence[Candidate], waiting: dict[int, Candidate], workers: Workers
) -> Iterator[CandidateResult]:
    """Those that come to an end; ``waiting`` keeps the others."""
    jobs = [(pack, each, workers.device(each.index), workers.threads) for each in candidates]
    try:
        for outcome in _outcomes(jobs, workers.number):
            del waiting[outcome.index]
            yield outcome
    except _deaths() as error:
        names = ", ".join(candidate.name for candidate in waiting.values())
        warnings.warn(f"a worker died ({type(error).__name__}); without a result: {names}", stacklevel=3)


def _outcomes(jobs: Sequence[tuple[Any, ...]], number: int) -> Iterable[CandidateResult]:
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
