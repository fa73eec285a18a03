"""What a whole network takes beyond its parts, fitted on random cuts of it (level 3)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.trace import trace
from lightning_prune.latency.backends import EXECUTIONS, Piece, random_on
from lightning_prune.latency.profiler import BackendSettings, TimingCurve
from lightning_prune.latency.timing import TimedCall, beside
from lightning_prune.selection.incremental_cost import unit_classes
from lightning_prune.surgery.prune import SurgeryError, prune_

__all__ = ["Correction", "corrected", "fitted", "parts", "random_units"]

BLOCK = 8  # channels; every other random cut leaves multiples of it
TIMES = 30  # runs of each network
CHOSEN = 10.0  # weight of the cut that one is after, and of the dense network then
DENSE = 3.0  # weight of the dense network: what is predicted of others are shares of it
ALIKE = 0.02  # how strongly the two factors hold together, against relative errors of networks


@dataclass(frozen=True)
class Correction:
    """From the parts to the whole: ``constant + even * parts of even width + odd * the others + cold * parameters``.

    Within a network weights are not in the processor's caches. Reading them takes time for each of them, and costs
    widths that do not fill a block of channels more than those that do, of which the dense network is made.

    Attributes:
        constant: nanoseconds.
        even: factor of parts whose channel counts are all multiples of eight.
        odd: factor of the others.
        cold: nanoseconds for each number in a parameter.
        cuts: how many random cuts were measured.
        error: median error of the share of the dense latency, each cut predicted without itself.
    """

    constant: float = 0.0
    even: float = 1.0
    odd: float = 1.0
    cold: float = 0.0
    cuts: int = 0
    error: float | None = None

    def time(self, piece: Piece, entry: TimingCurve, *counts: int) -> float:
        """Nanoseconds of a piece within its network, with so many channels along each axis."""
        factor = self.even if is_even(counts) else self.odd
        return factor * entry.time(piece, *counts) + self.cold * piece.parameters(counts)

    def whole(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Nanoseconds of networks from what :func:`parts` gives for each, shape (..., 3) -> (...)."""
        found: NDArray[np.float64] = self.constant + sums @ np.array([self.even, self.odd, self.cold])
        return found


def is_even(counts: Sequence[int]) -> bool:
    """Whether all counts fill blocks of eight channels."""
    return all(count % BLOCK == 0 for count in counts)


def parts(pieces: Sequence[Piece], found: Mapping[str, TimingCurve]) -> NDArray[np.float64]:
    """Nanoseconds of the pieces of even width, and of the others, and how many parameters they read, shape (3,)."""
    sums = np.zeros(3)
    for piece in pieces:
        if piece.signature in found:
            sums[0 if is_even(piece.most) else 1] += found[piece.signature].time(piece, *piece.most)
            sums[2] += piece.parameters(piece.most)
    return sums


def random_units(
    graph: ChannelGraph, generator: np.random.Generator, least: float = 0.1, multiple: int = 1
) -> list[int]:
    """Units of a random cut: of each class of units a share stays, around one for the whole network.

    Args:
        graph: of the network.
        generator: of random numbers.
        least: of the network's share.
        multiple: of units, that each class keeps if it is not smaller.
    """
    classes = np.array(unit_classes(graph))
    share, gone = generator.uniform(least, 1), []
    for kind in np.unique(classes[graph.prunable]):
        members = graph.prunable[classes[graph.prunable] == kind]
        keep = len(members) * float(np.clip(generator.normal(share, 0.2), 0.05, 1))
        gone += generator.permutation(members)[max(round(keep / multiple), 1) * multiple :].tolist()
    return gone


def corrected(
    graph: ChannelGraph,
    found: Mapping[str, TimingCurve],
    place: BackendSettings,
    cuts: int,
    seed: int = 0,
    chosen: Sequence[int] | None = None,
) -> Correction:
    """Hold the sum of the parts against whole networks: the dense one, and ``cuts`` random ones of it.

    The networks are copies; the traced one is left as it is. What is ``chosen`` to go is one more cut.
    It weighs more.
    """
    evidence, execution = graph.evidence, EXECUTIONS[place.execution]
    if not cuts or evidence is None:
        return Correction()
    args, kwargs = random_on((evidence.inputs, evidence.kwargs), place.device)
    nets = list(_cut_copies(graph, place.device, cuts, seed, chosen))
    with place.settled():
        runs: list[TimedCall] = [execution.whole(net, args, kwargs, place.threads) for net, _ in nets]
        times = beside(runs[0], runs[1:], place.device, place.threads, TIMES)
    sums = np.stack([parts(execution.pieces(each), found) for _, each in nets])
    weights = np.ones(len(nets))
    weights[0] = DENSE
    if chosen is not None:
        weights[[0, -1]] = CHOSEN
    return fitted(sums, np.array(times), weights)


def _cut_copies(
    graph: ChannelGraph, device: torch.device, cuts: int, seed: int, chosen: Sequence[int] | None = None
) -> Iterator[tuple[nn.Module, ChannelGraph]]:
    """The network and random cuts of it, with their graphs; what surgery refuses is not there."""
    evidence = graph.evidence
    assert evidence is not None
    generator, args, kwargs = np.random.default_rng(seed), evidence.inputs, evidence.kwargs
    for number in range(cuts + (1 if chosen is None else 2)):
        net = copy.deepcopy(evidence.tracker.model).eval()
        own = trace(net, *args, **kwargs)
        multiple = BLOCK if number % 2 else 1
        random = random_units(own, generator, multiple=multiple)
        gone = [] if number == 0 else random if number <= cuts else list(chosen or ())
        try:
            prune_(net, own, gone)
        except SurgeryError as refusal:
            warnings.warn(f"a random cut is not measured: {refusal}", stacklevel=2)
            continue
        yield net.to(device), trace(net, *args, **kwargs)


def fitted(
    sums: NDArray[np.float64], times: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> Correction:
    """The correction with the least relative errors, nothing of it negative.

    Args:
        sums: what :func:`parts` gives for each network, the dense one first, shape (networks, 3).
        times: nanoseconds of the whole networks, shape (networks,).
        weights: of their errors, shape (networks,); by default all count the same.

    Example:
        >>> sums = np.array([[8.0, 0.0, 0.0], [0.0, 4.0, 0.0], [1.0, 2.0, 0.0], [0.0, 1.0, 0.0]])
        >>> found = fitted(sums, 1 + sums @ [2.0, 2.0, 0.0])
        >>> found.constant, found.even, found.odd, found.cuts
        (1.0, 2.0, 2.0, 3)
    """
    weights = np.ones(len(sums)) if weights is None else weights
    errors = []
    for left_out in range(1, len(sums)):
        others = [n for n in range(len(sums)) if n != left_out]
        guess = _least_squares(sums[others], times[others], weights[others]).whole(sums)
        errors.append(abs(guess[left_out] / guess[0] / (times[left_out] / times[0]) - 1))
    error = round(float(np.median(errors)), 4) if len(sums) > 2 else None
    return replace(_least_squares(sums, times, weights), cuts=len(sums) - 1, error=error)


def _least_squares(
    sums: NDArray[np.float64], times: NDArray[np.float64], weights: NDArray[np.float64]
) -> Correction:
    """Constant and factors; the factors are alike, and parameters cost nothing, unless the networks say otherwise."""
    design = np.append(np.ones((len(sums), 1)), sums, 1) / times[:, None]
    if len(sums) < 3:  # too few to tell a constant from a factor
        design[:, 0] = 0
    if len(sums) < 5:
        design[:, 3] = 0
    typical = times[0] / sums[0, :2].sum()
    alike = [0.0, ALIKE / typical, -ALIKE / typical, 0.0]
    free = [0.0, 0.0, 0.0, ALIKE * float(sums[0, 2] / times[0])]
    wanted = np.append(weights, [0.0, 0.0])
    constant, even, odd, cold = nnls(np.append(design * weights[:, None], [alike, free], 0), wanted)[
        0
    ].tolist()
    return Correction(round(constant, 3), round(even, 6), round(odd, 6), round(cold, 6))
