"""Calibrate the sum of a network's parts against whole networks, measured on random cuts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.layer_costs import dense_trace_of
from lightning_prune.graph.trace import trace
from lightning_prune.latency.backends import EXECUTIONS, Piece, random_inputs
from lightning_prune.latency.profiler import BackendSettings, TimingCurve
from lightning_prune.latency.timing import TimedCall, paired_ratio, time_against_reference
from lightning_prune.selection.incremental_cost import unit_classes
from lightning_prune.surgery.prune import SurgeryError, prune_
from lightning_prune.utils.passing import on_all

__all__ = ["Correction", "calibrate", "fit_correction", "measured_ratio", "random_units", "sum_parts"]

BLOCK = 8  # channels; every other random cut leaves multiples of it
TIMES = 30  # timed runs of each network
CHOSEN_WEIGHT = 10.0  # weight of the chosen cut, and of the dense network if there is one
DENSE_WEIGHT = 3.0  # weight of the dense network: every prediction is a share of its latency
PRIOR_WEIGHT = (
    0.02  # weight of the assumption that the factors are equal, against relative errors of networks
)


@dataclass(frozen=True)
class Correction:
    """Latency of a network from its parts: ``constant + even * E + odd * O + cold * P``.

    E is the sum over parts whose channel counts are all multiples of eight, O the sum over the others, and P the
    number of parameters. Within a network weights are not in the processor's caches, so reading each of them takes
    additional time; this is a larger part of the time of widths that do not fill a block of channels.

    Attributes:
        constant: nanoseconds.
        even: factor of parts whose channel counts are all multiples of eight.
        odd: factor of the others.
        cold: nanoseconds for each element of a parameter.
        cuts: how many cuts were measured.
        error: median relative error of the latency as a share of the dense one, each cut predicted by a fit
            without it. None with fewer than two cuts.
    """

    constant: float = 0.0
    even: float = 1.0
    odd: float = 1.0
    cold: float = 0.0
    cuts: int = 0
    error: float | None = None

    def piece_time(self, piece: Piece, curve: TimingCurve, *counts: int) -> float:
        """Return the nanoseconds of a piece within its network, with ``counts`` channels along each axis."""
        factor = self.even if fills_blocks(counts) else self.odd
        return factor * curve.time(piece, *counts) + self.cold * piece.parameters(counts)

    def stretched(self, whole: float, factor: float) -> Correction:
        """Return a correction that predicts ``factor`` times as great a difference to one network, for any other.

        Args:
            whole: predicted nanoseconds of that network, whose prediction stays the same.
            factor: of the differences.

        Example:
            >>> correction = Correction(even=2.0).stretched(whole=100.0, factor=0.8)
            >>> round(correction.constant, 6), correction.even  # 50 is 60 now
            (20.0, 1.6)
        """
        return replace(
            self,
            constant=factor * self.constant + (1 - factor) * whole,
            even=factor * self.even,
            odd=factor * self.odd,
            cold=factor * self.cold,
        )

    def network_time(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the nanoseconds of networks from their :func:`sum_parts`, shape (..., 3) -> (...)."""
        times: NDArray[np.float64] = self.constant + sums @ np.array([self.even, self.odd, self.cold])
        return times


def fills_blocks(counts: Sequence[int]) -> bool:
    """Return whether all counts are multiples of eight."""
    return all(count % BLOCK == 0 for count in counts)


def sum_parts(pieces: Sequence[Piece], curves: Mapping[str, TimingCurve]) -> NDArray[np.float64]:
    """Sum up the pieces of a network as it was traced.

    Returns:
        Nanoseconds of the pieces that fill blocks, nanoseconds of the others, and the number of elements of the
        parameters that they read, shape (3,). Pieces without a curve are left out.
    """
    sums = np.zeros(3)
    for piece in pieces:
        if piece.signature in curves:
            counts = piece.dense_counts
            sums[0 if fills_blocks(counts) else 1] += curves[piece.signature].time(piece, *counts)
            sums[2] += piece.parameters(counts)
    return sums


def random_units(
    graph: ChannelGraph, generator: np.random.Generator, least: float = 0.1, multiple: int = 1
) -> list[int]:
    """Return the units of a random cut: each class of units keeps a share that varies around one for the network.

    Args:
        graph: of the network.
        generator: of random numbers.
        least: smallest share for the network.
        multiple: each class keeps a multiple of this many units, and at least this many if it has them.
    """
    classes = np.array(unit_classes(graph))
    share, remove = generator.uniform(least, 1), []
    for unit_class in np.unique(classes[graph.prunable]):
        members = graph.prunable[classes[graph.prunable] == unit_class]
        kept = len(members) * float(np.clip(generator.normal(share, 0.2), 0.05, 1))
        remove += generator.permutation(members)[max(round(kept / multiple), 1) * multiple :].tolist()
    return remove


def calibrate(
    graph: ChannelGraph,
    curves: Mapping[str, TimingCurve],
    settings: BackendSettings,
    cuts: int,
    seed: int = 0,
    chosen: Sequence[int] | None = None,
) -> Correction:
    """Fit the correction to whole networks: the dense one and random cuts of it.

    The networks are copies; the traced one is not changed.

    Args:
        graph: of the dense network.
        curves: signature of a piece -> its times.
        settings: where and how to run.
        cuts: how many random cuts to measure.
        seed: of the random cuts.
        chosen: units of one more cut, which gets a larger weight.
    """
    evidence, execution = graph.evidence, EXECUTIONS[settings.execution]
    if not cuts or evidence is None:
        return Correction()
    args, kwargs = random_inputs(evidence.examples[0], settings.device)
    nets = list(_cut_copies(graph, settings.device, cuts, seed, chosen))
    with settings.active():
        calls: list[TimedCall] = [execution.network(net, args, kwargs, settings.threads) for net, _ in nets]
        times = time_against_reference(calls[0], calls[1:], settings.device, settings.threads, TIMES)
    sums = np.stack([sum_parts(execution.pieces(net_graph), curves) for _, net_graph in nets])
    weights = np.ones(len(nets))
    weights[0] = DENSE_WEIGHT
    if chosen is not None:
        weights[[0, -1]] = CHOSEN_WEIGHT
    return fit_correction(sums, np.array(times), weights)


def measured_ratio(
    graph: ChannelGraph, settings: BackendSettings, remove: Sequence[int], blocks: Sequence[str] = ()
) -> float:
    """Return the time of a network without some units as a share of the time with them, both measured in turns.

    Args:
        graph: of the network.
        settings: where and how to run.
        remove: units.
        blocks: names of residual blocks that vanish too.

    Raises:
        SurgeryError: the cut is refused.
    """
    evidence = dense_trace_of(graph)
    args, kwargs = evidence.examples[0]
    nets = [copy.deepcopy(evidence.tracker.model).eval() for _ in range(2)]
    others = [inputs or named for inputs, named in evidence.examples[1:]]
    copied_graph = trace(nets[1], *args, others=others, **kwargs)
    on_all(partial(prune_, nets[1], copied_graph, list(remove), blocks=blocks))
    args, kwargs = random_inputs(evidence.examples[0], settings.device)
    with settings.active():
        make_call = EXECUTIONS[settings.execution].network
        calls = [make_call(net.to(settings.device), args, kwargs, settings.threads) for net in nets]
        return paired_ratio(calls[0], calls[1], settings.device, settings.threads)


def _cut_copies(
    graph: ChannelGraph, device: torch.device, cuts: int, seed: int, chosen: Sequence[int] | None = None
) -> Iterator[tuple[nn.Module, ChannelGraph]]:
    """Yield copies with their graphs: the dense network, ``cuts`` random cuts, and the chosen one if there is one.

    Cuts that surgery refuses are left out, with a warning.
    """
    evidence = graph.evidence
    assert evidence is not None
    generator, (args, kwargs) = np.random.default_rng(seed), evidence.examples[0]
    others = [inputs or named for inputs, named in evidence.examples[1:]]  # as `trace` was given them
    for number in range(cuts + (1 if chosen is None else 2)):
        net = copy.deepcopy(evidence.tracker.model).eval()
        net_graph = trace(net, *args, others=others, **kwargs)
        # Drawn for the dense and the chosen network too, so that the random cuts are the same with and without.
        random = random_units(net_graph, generator, multiple=BLOCK if number % 2 else 1)
        remove = [] if number == 0 else random if number <= cuts else list(chosen or ())
        try:
            on_all(partial(prune_, net, net_graph, remove))
        except SurgeryError as error:
            warnings.warn(f"a random cut is not measured, because it was refused: {error}", stacklevel=2)
            continue
        yield net.to(device), trace(net, *args, **kwargs)


def fit_correction(
    sums: NDArray[np.float64], times: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> Correction:
    """Fit the correction with the least relative errors and no negative coefficient.

    Args:
        sums: of each network, from :func:`sum_parts`, the dense one first, shape (networks, 3).
        times: nanoseconds of the whole networks, shape (networks,).
        weights: of their errors, shape (networks,); by default equal.

    Example:
        >>> sums = np.array([[8.0, 0.0, 0.0], [0.0, 4.0, 0.0], [1.0, 2.0, 0.0], [0.0, 1.0, 0.0]])
        >>> correction = fit_correction(sums, 1 + sums @ [2.0, 2.0, 0.0])
        >>> correction.constant, correction.even, correction.odd, correction.cuts
        (1.0, 2.0, 2.0, 3)
    """
    weights = np.ones(len(sums)) if weights is None else weights
    errors = []
    for left_out in range(1, len(sums)):
        others = [n for n in range(len(sums)) if n != left_out]
        predicted = _least_squares(sums[others], times[others], weights[others]).network_time(sums)
        errors.append(abs(predicted[left_out] / predicted[0] / (times[left_out] / times[0]) - 1))
    error = round(float(np.median(errors)), 4) if len(sums) > 2 else None
    return replace(_least_squares(sums, times, weights), cuts=len(sums) - 1, error=error)


def _least_squares(
    sums: NDArray[np.float64], times: NDArray[np.float64], weights: NDArray[np.float64]
) -> Correction:
    """Fit the coefficients; two weak priors say that the factors are equal and that parameters cost nothing."""
    design = np.append(np.ones((len(sums), 1)), sums, 1) / times[:, None]
    if len(sums) < 3:  # too few networks to separate the constant from a factor
        design[:, 0] = 0
    if len(sums) < 5:  # too few to fit the cost of parameters too
        design[:, 3] = 0
    typical = times[0] / sums[0, :2].sum()
    equal_factors = [0.0, PRIOR_WEIGHT / typical, -PRIOR_WEIGHT / typical, 0.0]
    free_parameters = [0.0, 0.0, 0.0, PRIOR_WEIGHT * float(sums[0, 2] / times[0])]
    matrix = np.append(design * weights[:, None], [equal_factors, free_parameters], 0)
    coefficients, _ = nnls(matrix, np.append(weights, [0.0, 0.0]))
    constant, even, odd, cold = coefficients.tolist()
    return Correction(round(constant, 3), round(even, 6), round(odd, 6), round(cold, 6))
