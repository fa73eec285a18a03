"""The scales of norms while they are slimmed: what pushes them, how large they are on average (level 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.criteria.base import Values
from lightning_prune.pruning.session import PruningSession
from lightning_prune.slimming.penalty import Penalty
from lightning_prune.slimming.policy import SlimmingPolicy, scale_sizes
from lightning_prune.tracing.ids import Units

__all__ = ["NormScales", "check_arguments", "loss_scale"]


class NormScales:
    """Scales and penalty of a network as it is between two cuts.

    Args:
        run: the network.
        rules: which of its scales are slimmed.
        by: whose costs make the penalty.

    Attributes:
        scales: qualified name of each scale -> unit of each channel.
        penalty: on them.

    Raises:
        ValueError: a name matches no norm, there is no norm to slim, or the resource is unknown.
    """

    def __init__(self, run: PruningSession, rules: SlimmingPolicy, by: str) -> None:
        self.run, self.graph = run, run.graph
        self.scales: dict[str, Units] = rules.scales(run.graph, run.target)
        self.penalty = Penalty.of(run.graph, run.target, self.scales, by)

    def is_of(self, run: PruningSession) -> bool:
        """Whether the network is the same still."""
        return self.run is run and self.graph is run.graph

    @torch.no_grad()
    def follow_(self, average: MutableMapping[str, Tensor], held: Iterable[Tensor], decay: float) -> None:
        """Let a moving average take in the scales among ``held``; in float32, where small steps still count."""
        known = {id(parameter) for parameter in held}
        for name, scale in self.penalty.scales.items():
            if id(scale) in known:
                now = scale.detach().float()
                average[name] = average.get(name, now).to(now).lerp(now, 1 - decay)

    def sizes(self, copies: Sequence[nn.Module], average: Mapping[str, Tensor], with_own: bool) -> Values:
        """The size of each unit's scales in averaged ``copies``, else in an ``average``; ``with_own``: here too."""
        own = gammas(self.run.target, self.scales)
        averaged = [gammas(network, self.scales) for network in copies] or [dict(average)]
        held = [{**own, **found} for found in averaged]  # what no optimizer has moved yet has no average
        return scale_sizes(self.graph, self.scales, [own, *held] if with_own else held)

    def idle(self, average: Mapping[str, Tensor]) -> str:
        """What to say of scales that no optimizer has stepped with; nothing if there are none."""
        idle = [name for name in self.scales if name not in average]
        if not idle:
            return ""
        names = ", ".join([*idle[:3], *["..."][: len(idle) - 3]])
        return (
            f"nothing pushes {len(idle)} of {len(self.scales)} scales ({names}): no optimizer has "
            "stepped with them that Lightning knows of; under manual optimization step with what self.optimizers() "
            "gives, and leave out norms that are not trained"
        )

    def check_threshold(self, threshold: float) -> None:
        """Raise ValueError if everything would go at once; scales of 0 may be about to rise."""
        sizes = self.sizes((), {}, with_own=True)
        sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
        if len(sizes) and sizes.max() <= threshold:
            raise ValueError(
                f"threshold={threshold} is not below any scale, the largest is {sizes.max():.3g}: all channels that "
                "may go would, after the first epoch; give a smaller one"
            )


def gammas(model: nn.Module, scales: Iterable[str]) -> dict[str, Tensor]:
    """The scales by name."""
    return {name: model.get_parameter(name) for name in scales}


def loss_scale(scaler: Any, optimizer: torch.optim.Optimizer) -> float:
    """What the gradients are still multiplied by: fused optimizers under fp16 unscale them themselves."""
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def check_arguments(
    rho: float,
    threshold: float,
    shrink_at: float,
    average_decay: float,
    end_epoch: int | None,
    warmup_epochs: int,
    warmup_steps: int,
) -> None:
    """Raise ValueError if an argument of ``SlimmingCallback`` is out of range."""
    last = 0 if end_epoch is None else end_epoch
    for name, value, high in (
        ("rho", rho, math.inf),
        ("threshold", threshold, math.inf),
        ("shrink_at", shrink_at, 1),
        ("average_decay", average_decay, 1),
        ("end_epoch", last, math.inf),
        ("warmup_epochs", warmup_epochs, math.inf),
        ("warmup_steps", warmup_steps, math.inf),
    ):
        if not (0 <= value <= high and math.isfinite(value)):
            above = f"in [0, {high}]" if math.isfinite(high) else "a number of 0 or more"
            raise ValueError(f"{name} must be {above}, got {value}")
    if average_decay == 1:
        raise ValueError("average_decay must be less than 1, or the average never moves")
    if warmup_epochs and warmup_steps:
        raise ValueError("give warmup_epochs or warmup_steps, not both")
    if end_epoch is not None and warmup_epochs > end_epoch + 1:
        raise ValueError(
            f"rho would still rise (warmup_epochs={warmup_epochs}) when end_epoch={end_epoch} is over"
        )
