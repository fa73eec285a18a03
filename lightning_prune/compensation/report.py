"""Report of a repair: changed layers, layers left alone, and the distance of the outputs from the dense ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_prune.utils.formatting import counted

__all__ = ["CompensationReport", "LayerRepair"]


@dataclass(frozen=True)
class LayerRepair:
    """The repair of one weight; residuals are of images that took no part in the fit, as shares of the variance.

    Attributes:
        before: residual with the weight that the cut left.
        after: residual with the repaired weight; equal to ``before`` if the repair was not accepted.
        damping: of the ridge regression; infinite if only the constant was changed, None if nothing was.

    Example:
        >>> repair = LayerRepair(before=0.4, after=0.1, damping=1e-3)
        >>> repair.changed
        True
    """

    before: float
    after: float
    damping: float | None

    @property
    def changed(self) -> bool:
        """Whether the layer was changed."""
        return self.damping is not None


@dataclass(frozen=True)
class CompensationReport:
    """The outcome of :func:`~lightning_prune.compensation.repair.compensate_`.

    Attributes:
        accepted: whether the network was changed; False: it is as the cut left it.
        reason: why nothing was changed; empty if something was.
        change_before: squared distance of the outputs from the dense ones, as a share of their variance, on images
            that took no part in the fit; NaN if it was not measured.
        change_after: the same after the repair, also of one that was undone.
        layers: repair of each layer; layers that share a weight have one entry, under the first name.
        left_alone: layer -> why it was not repaired.
        not_refined: why ``CompensationSettings.refine_passes`` had no effect; empty if it had, or is 0.

    Example:
        >>> CompensationReport(False, "the outputs did not come nearer").accepted
        False
    """

    accepted: bool
    reason: str = ""
    change_before: float = math.nan
    change_after: float = math.nan
    layers: Mapping[str, LayerRepair] = field(default_factory=dict)
    left_alone: Mapping[str, str] = field(default_factory=dict)
    not_refined: str = ""

    def __str__(self) -> str:
        if not self.accepted:
            return f"not repaired: {self.reason}"
        number = sum(layer.changed for layer in self.layers.values())
        alone = f", {len(self.left_alone)} left alone" if self.left_alone else ""
        alone += f", not refined: {self.not_refined}" if self.not_refined else ""
        change = f"change {self.change_before:.2g} → {self.change_after:.2g}"
        return f"{counted(number, 'layer')} repaired{alone}, {change}"
