"""Fit one weight to sampled rows of all its calls, and judge the fit by images that took no part in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prune.compensation.ridge import RidgeSystem

__all__ = ["CallRows", "Fit", "fit", "refit", "squared"]

# Dampings below the first number overfit few images. They are for linear dependences that are exact, and must leave
# no more of the residual than the second number.
_EXACT, _EXACT_GAIN = 1e-4, 0.1

_STEPS = 4  # of fits to outputs with slack, for each damping

_Constants = Mapping[str | None, Tensor]  # (groups, 1, filters of a group)


@dataclass(frozen=True)
class CallRows:
    """Inputs of a weight in one call, and residuals of its outputs.

    Attributes:
        slot: what takes the constant part of the change, such as a bias; None if nothing can.
        x: inputs at the positions for the fit, (groups, positions, inputs).
        residual: target minus output there, (groups, positions, filters).
        held_x: inputs at the positions that judge the fit.
        held_residual: target minus output there.
        variance: summed squared deviation of the held-out targets from their mean.
        slack: what the output may exceed its target by: up to a positive number, or down to a negative one; 0:
            nothing. Shape of ``residual``; None: nowhere.
        held_slack: in the same way.
    """

    slot: str | None
    x: Tensor
    residual: Tensor
    held_x: Tensor
    held_residual: Tensor
    variance: float
    slack: Tensor | None = None
    held_slack: Tensor | None = None

    def joined(self) -> CallRows:
        """Return the rows with those of the held-out images among those for the fit."""
        x = torch.cat((self.x, self.held_x), 1)
        residual = torch.cat((self.residual, self.held_residual), 1)
        slack = (
            None
            if self.slack is None or self.held_slack is None
            else torch.cat((self.slack, self.held_slack), 1)
        )
        return replace(self, x=x, residual=residual, slack=slack)


@dataclass(frozen=True)
class Fit:
    """Change of a weight.

    Attributes:
        before: held-out residual of the weight as it is, as a share of the variance of the targets.
        after: the same of the changed weight.
        damping: that was chosen; infinite if only constants change; None if the weight should stay.
        change: of the weight's matrix.
        constants: what is to be added to the outputs in each slot, one number per filter.
    """

    before: float
    after: float
    damping: float | None
    change: Tensor | None = None
    constants: Mapping[str, Tensor] | None = None


def squared(residual: Tensor, slack: Tensor | None) -> float:
    """Return the sum of squares of a residual where it matters."""
    return float(_effective(residual, slack).double().square().sum())


def _effective(residual: Tensor, slack: Tensor | None) -> Tensor:
    """Return a residual with zeros where the output is as good as its target."""
    if slack is None:
        return residual
    beyond = residual + slack
    one_sided = torch.where(slack > 0, beyond.clamp(max=0), beyond.clamp(min=0))
    return torch.where(slack == 0, residual, one_sided)


def fit(calls: Sequence[CallRows], dampings: Sequence[float]) -> Fit:
    """Fit with several dampings, and choose the one with the lowest held-out residual."""
    variance = max(sum(call.variance for call in calls), 1e-12)
    before = sum(squared(call.held_residual, call.held_slack) for call in calls)
    best, chosen = before, None
    for damping, change, constants in _solutions(calls, sorted(dampings, reverse=True)):
        after = sum(squared(_left(call, change, constants, held=True), call.held_slack) for call in calls)
        if after < best * (_EXACT_GAIN if damping < _EXACT else 1):
            best, chosen = after, (damping, change, constants)
    if chosen is None:
        return Fit(before / variance, before / variance, None)
    damping, change, constants = chosen
    return Fit(before / variance, best / variance, damping, change, _flat(constants))


def refit(calls: Sequence[CallRows], damping: float) -> Fit:
    """Fit to all rows, also to those of the held-out images, with a damping that was chosen before."""
    joined = [call.joined() for call in calls]
    for each, change, constants in _solutions(joined, [] if math.isinf(damping) else [damping]):
        if each == damping:
            return Fit(math.nan, math.nan, damping, change, _flat(constants))
    return fit(calls, [damping])


def _flat(constants: _Constants) -> dict[str, Tensor]:
    """Return one number per filter for each slot."""
    return {slot: constant.flatten() for slot, constant in constants.items() if slot is not None}


def _solutions(
    calls: Sequence[CallRows], dampings: Sequence[float]
) -> Iterator[tuple[float, Tensor, _Constants]]:
    """Yield candidates for the change and its constants: none but constants, and one for each damping."""
    means = _means(calls, [call.x for call in calls])
    x = torch.cat([call.x - means[call.slot] for call in calls], 1)
    none = x.new_zeros(len(x), x.shape[2], calls[0].residual.shape[2])
    system = RidgeSystem(x)
    for damping in (math.inf, *dampings):
        solve = (lambda residual: none) if math.isinf(damping) else system.solver(damping)
        if solve is not None:
            yield damping, *_fitted(calls, means, solve)


def _fitted(
    calls: Sequence[CallRows], means: Mapping[str | None, Tensor], solve: Callable[[Tensor], Tensor]
) -> tuple[Tensor, _Constants]:
    """Fit to the targets, and then again and again where outputs have slack.

    Outputs that are as good as their target become targets themselves: each step lowers the sum of squares that
    counts, which is convex.
    """
    change, constants = _solved(calls, means, [call.residual for call in calls], solve)
    last = change, constants
    for step in range(_STEPS if any(call.slack is not None for call in calls) else 0):
        momentum = step / (step + 3)  # of Nesterov's, since steps get short
        ahead = change + momentum * (change - last[0])
        constants_ahead = {slot: each + momentum * (each - last[1][slot]) for slot, each in constants.items()}
        last = change, constants
        residuals = []
        for call in calls:
            left = _left(call, ahead, constants_ahead)
            residuals.append(call.residual - left + _effective(left, call.slack))
        change, constants = _solved(calls, means, residuals, solve)
    return change, constants


def _solved(
    calls: Sequence[CallRows],
    means: Mapping[str | None, Tensor],
    residuals: Sequence[Tensor],
    solve: Callable[[Tensor], Tensor],
) -> tuple[Tensor, _Constants]:
    """Return the change, and its constants, for residuals of the calls."""
    mean_residuals = _means(calls, residuals)
    centred = [each - mean_residuals[call.slot] for call, each in zip(calls, residuals, strict=True)]
    change = solve(torch.cat(centred, 1))
    return change, {slot: mean - means[slot] @ change for slot, mean in mean_residuals.items()}


def _means(calls: Sequence[CallRows], rows: Sequence[Tensor]) -> dict[str | None, Tensor]:
    """Return the mean of the rows of calls, for each slot; zeros where no slot takes a constant."""
    means = {}
    for slot in {call.slot: None for call in calls}:
        joined = torch.cat([each for call, each in zip(calls, rows, strict=True) if call.slot == slot], 1)
        mean = joined.mean(1, keepdim=True)
        means[slot] = torch.zeros_like(mean) if slot is None else mean
    return means


def _left(call: CallRows, change: Tensor, constants: _Constants, held: bool = False) -> Tensor:
    """Return the residual that a change leaves."""
    x, residual = (call.held_x, call.held_residual) if held else (call.x, call.residual)
    return residual - x @ change - constants[call.slot]
