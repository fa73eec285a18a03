"""The slimmed scales of a network between two cuts: their penalty, moving average and sizes."""

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
    """The slimmed scales of a network between two cuts, with their penalty.

    Args:
        session: the network and its graph.
        policy: which scales are slimmed.
        by: the resource whose costs weight the penalty.

    Attributes:
        scales: qualified name of each scale -> unit of each channel.
        penalty: the penalty on the scales.

    Raises:
        ValueError: a name matches no norm, there is no norm to slim, or the resource is unknown.
    """

    def __init__(self, session: PruningSession, policy: SlimmingPolicy, by: str) -> None:
        self.session, self.graph = session, session.graph
        self.scales: dict[str, Units] = policy.scales(session.graph, session.target)
        self.penalty = Penalty.of(session.graph, session.target, self.scales, by)

    def matches(self, session: PruningSession) -> bool:
        """Whether ``session`` still has the network and the graph that these scales were collected from."""
        return self.session is session and self.graph is session.graph

    @torch.no_grad()
    def update_average_(
        self, average: MutableMapping[str, Tensor], parameters: Iterable[Tensor], decay: float
    ) -> None:
        """Update a moving average of the scales in place.

        Args:
            average: name of the scale -> its average; in float32, since half precision would round small steps to 0.
            parameters: the parameters that an optimizer steps; only scales among them are updated.
            decay: the weight of the old average.
        """
        stepped = {id(parameter) for parameter in parameters}
        for name, scale in self.penalty.scales.items():
            if id(scale) in stepped:
                value = scale.detach().float()
                average[name] = average.get(name, value).to(value).lerp(value, 1 - decay)

    def sizes(
        self, copies: Sequence[nn.Module], average: Mapping[str, Tensor], include_model: bool
    ) -> Values:
        """Return the size of each unit's scales, see :func:`~lightning_prune.slimming.policy.scale_sizes`.

        Args:
            copies: averaged copies of the network.
            average: the moving average, which is used if there are no copies.
            include_model: whether the scales of the network itself are used too.
        """
        model_values = gammas(self.session.target, self.scales)
        averages = [gammas(network, self.scales) for network in copies] or [dict(average)]
        # Scales that no optimizer has moved yet have no average: their present values take its place.
        completed = [{**model_values, **values} for values in averages]
        sources = [model_values, *completed] if include_model else completed
        return scale_sizes(self.graph, self.scales, sources)

    def idle_warning(self, average: Mapping[str, Tensor]) -> str:
        """Return a warning that names the scales without ``average``, which no optimizer has stepped; "" if none."""
        idle = [name for name in self.scales if name not in average]
        if not idle:
            return ""
        names = ", ".join([*idle[:3], *(["..."] if len(idle) > 3 else [])])
        return (
            f"the penalty does not reach {len(idle)} of {len(self.scales)} scales ({names}): no optimizer that "
            "Lightning wraps has stepped them; under manual optimization step the optimizers that "
            "self.optimizers() returns, and leave norms that are not trained out of norms="
        )

    def check_threshold(self, threshold: float) -> None:
        """Raise ValueError if no scale is above the threshold; scales of 0 are ignored, since they may still grow."""
        sizes = self.sizes((), {}, include_model=True)
        sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
        if len(sizes) and sizes.max() <= threshold:
            raise ValueError(
                f"threshold={threshold} is not below any scale, the largest is {sizes.max():.3g}: all removable "
                "channels would be removed after the first epoch; choose a smaller threshold"
            )


def gammas(model: nn.Module, scales: Iterable[str]) -> dict[str, Tensor]:
    """Return the scales of ``model`` by name."""
    return {name: model.get_parameter(name) for name in scales}


def loss_scale(scaler: Any, optimizer: torch.optim.Optimizer) -> float:
    """Return the factor by which gradients are still multiplied when ``optimizer`` steps.

    It is 1, except for fused optimizers under float16, which unscale the gradients inside their step.
    """
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
    for name, value, maximum in (
        ("rho", rho, math.inf),
        ("threshold", threshold, math.inf),
        ("shrink_at", shrink_at, 1),
        ("average_decay", average_decay, 1),
        ("end_epoch", 0 if end_epoch is None else end_epoch, math.inf),
        ("warmup_epochs", warmup_epochs, math.inf),
        ("warmup_steps", warmup_steps, math.inf),
    ):
        if not (0 <= value <= maximum and math.isfinite(value)):
            valid = f"in [0, {maximum}]" if math.isfinite(maximum) else "a number of 0 or more"
            raise ValueError(f"{name} must be {valid}, got {value}")
    if average_decay == 1:
        raise ValueError("average_decay must be less than 1, or the average never changes")
    if warmup_epochs and warmup_steps:
        raise ValueError("give warmup_epochs or warmup_steps, not both")
    if end_epoch is not None and warmup_epochs > end_epoch + 1:
        raise ValueError(
            f"the warm-up of rho would end after slimming: warmup_epochs={warmup_epochs}, end_epoch={end_epoch}"
        )
