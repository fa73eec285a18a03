"""Plans whose latency is measured: predict, measure the planned network, correct the predictions, and plan again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_prune.latency.calibration import Correction
from lightning_prune.selection.plan import Plan
from lightning_prune.surgery.prune import SurgeryError

__all__ = ["ClosedLoop"]

SHORTEST_WAY = 1e-3  # of the network, below which the effect of a cut says nothing about the predictions
BINDING = 0.97  # share of a budget above which it is what ends a plan


#: factor of the predicted differences, and the relative error of the plan that was made with it
Point = tuple[float, float]


@dataclass(frozen=True)
class ClosedLoop:
    """Plans again until the planned network, measured, has the latency of the budget.

    Predictions are good on average, but a plan is chosen for what is predicted to be fast, so that it also gathers
    what is predicted too fast. Each turn measures the planned network in turns with the present one, and stretches
    all predictions around it, until a plan is as fast as its budget says.

    Args:
        resource: name of the latency among the costs of a plan.
        turns: largest number of measurements.
        tolerance: largest error of the measured latency, as a share of the budget.
    """

    resource: str
    turns: int
    tolerance: float

    def run(
        self,
        correction: Correction,
        plan_with: Callable[[Correction], Plan],
        measure: Callable[[Plan], float],
    ) -> tuple[Plan, Correction]:
        """Return the first plan within the tolerance, or the nearest, with a warning; and its correction.

        Args:
            correction: of the predictions so far.
            plan_with: returns the plan by corrected predictions.
            measure: returns the latency of a plan's network as a share of that of the present one.
        """
        nearest: tuple[float, Plan, Correction] | None = None
        stretched, stretch, points = correction, 1.0, list[Point]()
        for _ in range(self.turns):
            plan = plan_with(stretched)
            change = plan.costs[self.resource]
            if not plan.reached or change.target is None or change.after > (1 - SHORTEST_WAY) * change.before:
                break
            try:
                latency = measure(plan) * change.before
            except SurgeryError:  # the cut says what to do about it
                break
            error = latency / change.target - 1
            if nearest is None or abs(error) < abs(nearest[0]):
                nearest = error, plan, stretched
            is_slack = error < 0 and change.after < BINDING * change.target
            if abs(error) <= self.tolerance or is_slack or latency >= change.before:
                break
            points.append((stretch, error))
            proportional = stretch * (change.before - latency) / (change.before - change.after)
            stretch = _next_stretch(points, proportional)
            stretched = correction.stretched(change.before, stretch)
        if nearest is None:
            return plan_with(stretched), stretched
        if nearest[0] > self.tolerance:
            warnings.warn(self._missed(nearest[0]), stacklevel=5)
        return nearest[1:]

    def _missed(self, error: float) -> str:
        return (
            f"the measured {self.resource} of the plan is {error:.1%} above its budget after {self.turns} turns, by "
            f"the predictions it meets it: use more turns=, or a lower budget"
        )


def _next_stretch(points: Sequence[Point], proportional: float) -> float:
    """Return where the error vanishes between the last points below and above it; else, the proportional one.

    Example:
        >>> round(_next_stretch([(1.0, 0.4), (0.6, -0.2)], proportional=0.5), 4)
        0.7333
    """
    above = [point for point in points if point[1] > 0]
    below = [point for point in points if point[1] <= 0]
    if not above or not below:
        return proportional
    (high, too_slow), (low, too_fast) = above[-1], below[-1]
    return low + (high - low) * -too_fast / (too_slow - too_fast)
