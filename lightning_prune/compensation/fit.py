"""Fit one weight to sampled rows of all its calls, and judge the fit by images that took no part in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.compensation.ridge import ridge

__all__ = ["CallRows", "Fit", "fit", "refit"]

# Dampings below the first number overfit few images. They are for linear dependences that are exact, and must leave
# no more of the residual than the second number.
_EXACT, _EXACT_GAIN = 1e-4, 0.1

_Means = Mapping[str | None, tuple[Tensor, Tensor]]


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
    """

    slot: str | None
    x: Tensor
    residual: Tensor
    held_x: Tensor
    held_residual: Tensor
    variance: float

    def joined(self) -> CallRows:
        """Return the rows with those of the held-out images among those for the fit."""
        x = torch.cat((self.x, self.held_x), 1)
        residual = torch.cat((self.residual, self.held_residual), 1)
        return CallRows(self.slot, x, residual, self.held_x, self.held_residual, self.variance)


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


def fit(calls: Sequence[CallRows], dampings: Sequence[float]) -> Fit:
    """Fit with several dampings, and choose the one with the lowest held-out residual."""
    means = _means(calls)
    variance = max(sum(call.variance for call in calls), 1e-12)
    before = sum(float(call.held_residual.double().square().sum()) for call in calls)
    best, chosen = before, None
    for damping, change in _solutions(calls, means, sorted(dampings, reverse=True)):
        after = _held_residual(calls, means, change)
        if after < best * (_EXACT_GAIN if damping < _EXACT else 1):
            best, chosen = after, (damping, change)
    if chosen is None:
        return Fit(before / variance, before / variance, None)
    damping, change = chosen
    return Fit(before / variance, best / variance, damping, change, _constants(means, change))


def refit(calls: Sequence[CallRows], damping: float) -> Fit:
    """Fit to all rows, also to those of the held-out images, with a damping that was chosen before."""
    joined = [call.joined() for call in calls]
    means = _means(joined)
    solutions = _solutions(joined, means, [] if math.isinf(damping) else [damping])
    change = dict(solutions).get(damping)
    if change is None:
        return fit(calls, [damping])
    return Fit(math.nan, math.nan, damping, change, _constants(means, change))


def _constants(means: _Means, change: Tensor) -> dict[str, Tensor]:
    """Return what a change lacks on average, one number per filter for each slot."""
    return {
        slot: (residual - x @ change).flatten() for slot, (x, residual) in means.items() if slot is not None
    }


def _means(calls: Sequence[CallRows]) -> _Means:
    """Return the means of inputs and residuals in each slot; zeros where no slot takes a constant."""
    means: dict[str | None, tuple[Tensor, Tensor]] = {}
    for slot in {call.slot: None for call in calls}:
        x = torch.cat([call.x for call in calls if call.slot == slot], 1).mean(1, keepdim=True)
        residual = torch.cat([call.residual for call in calls if call.slot == slot], 1).mean(1, keepdim=True)
        means[slot] = (torch.zeros_like(x), torch.zeros_like(residual)) if slot is None else (x, residual)
    return means


def _solutions(
    calls: Sequence[CallRows], means: _Means, dampings: Sequence[float]
) -> list[tuple[float, Tensor]]:
    """Return candidates for the change: none but that of constants, and one for each damping."""
    x = torch.cat([call.x - means[call.slot][0] for call in calls], 1)
    residual = torch.cat([call.residual - means[call.slot][1] for call in calls], 1)
    none = x.new_zeros(len(x), x.shape[2], residual.shape[2])
    return [(math.inf, none), *ridge(x, residual, dampings)]


def _held_residual(calls: Sequence[CallRows], means: _Means, change: Tensor) -> float:
    """Return the squared residual of the held-out rows after a change."""
    total = 0.0
    for call in calls:
        x, residual = means[call.slot]
        left = call.held_residual - residual - (call.held_x - x) @ change
        total += float(left.double().square().sum())
    return total
