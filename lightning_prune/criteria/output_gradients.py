"""Gradients of the outputs instead of the loss: they do not vanish when a network is trained to the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.criteria.base import NO_STATISTICS, Importance, Observer, Statistics, Values
from lightning_prune.criteria.gradients import gates
from lightning_prune.criteria.reduction import Normalise, Reduction, plain, reduced
from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.tracing.calls import tensors_in
from lightning_prune.utils.distributed import gather_all
from lightning_prune.utils.modules import training_modes, without_forward_hooks

__all__ = ["OutputGradients", "OutputTaylor"]


class OutputGradients:
    """Observer of the squared gradients of a network's outputs at the gates of its units, in O(channels) memory.

    The inputs of each observed forward run once more in eval mode, without a trace in ``.grad``, running statistics
    or random numbers, and without the forward hooks, such as those that record features for distillation. For signs v
    that are random for each output, ``(d v.f / dz)^2`` is an unbiased estimate of the sum of the squared gradients of
    all outputs and samples (Hutchinson, 1990), at the price of one backward.

    Args:
        graph: the graph of ``model``.
        model: the traced module.
        projections: number of backwards per batch.
        batches: number of forwards to observe; later ones are not.
        seed: of the signs.

    Example:
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> gradients = OutputGradients(trace(net, torch.zeros(1, 1)), net).attach()
        >>> _ = net(torch.ones(1, 1))
        >>> gradients.detach()
        >>> gradients.compute()["0.weight"].shape
        (2,)
    """

    observes_steps = False

    def __init__(
        self, graph: ChannelGraph, model: nn.Module, projections: int = 4, batches: int = 8, seed: int = 0
    ) -> None:
        self.active = True
        self.model, self.projections, self.batches, self.seed = model, projections, batches, seed
        self.gates = gates(graph, model)
        self.sums = {
            name: torch.zeros(len(gate.units), device=gate.weight.device) for name, gate in self.gates.items()
        }
        self.observed = 0
        self._marked = dict(self.sums), 0
        self._handle: RemovableHandle | None = None

    def attach(self) -> Self:
        """Register the forward hook."""
        self.detach()
        self._handle = self.model.register_forward_hook(self._observe, with_kwargs=True)
        return self

    def detach(self) -> None:
        """Remove the hook; keep the statistics."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def mark(self) -> None:
        """Remember the present sums, for :meth:`rewind`."""
        self._marked = dict(self.sums), self.observed

    def rewind(self) -> None:
        """Go back to the sums of the last :meth:`mark`."""
        sums, self.observed = self._marked
        self.sums = dict(sums)

    def on_step(self, parameters: Iterable[Tensor]) -> None:
        """Do nothing: the gradients of the loss are not observed."""

    def _observe(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.active and self.observed < self.batches:
            for name, values in self._squares(args, kwargs).items():
                self.sums[name] = self.sums[name] + values
            self.observed += 1

    def _squares(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Return the squared gradients at all gates, summed over projections."""
        parameters = {id(p): p for gate in self.gates.values() for p in gate.parameters}
        frozen = [p for p in parameters.values() if not p.requires_grad]
        squares = {name: torch.zeros_like(values) for name, values in self.sums.items()}
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for gradients in self._gradients(list(parameters.values()), args, kwargs):
                for name, gate in self.gates.items():
                    squares[name] += gate.gradient(gradients).square()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        return squares

    def _gradients(
        self, parameters: list[nn.Parameter], args: Any, kwargs: Any
    ) -> Iterator[dict[int, Tensor]]:
        """Yield the gradients of random projections of the outputs, by identity of the parameter."""
        devices = [parameters[0].device] if parameters and parameters[0].is_cuda else []
        with (
            torch.enable_grad(),
            training_modes(self.model, lambda module: False),
            without_forward_hooks(self.model),
            torch.random.fork_rng(devices),
        ):
            torch.manual_seed(self.seed + self.observed)
            outputs = [out for out in tensors_in(self.model.forward(*args, **kwargs)) if out.requires_grad]
            for number in range(self.projections if outputs else 0):
                # Drawn on the CPU: every device has another generator, and would rank filters otherwise.
                signs = [torch.randint_like(out, 2, device="cpu").to(out.device) * 2 - 1 for out in outputs]
                keep = number + 1 < self.projections
                grads = torch.autograd.grad(outputs, parameters, signs, retain_graph=keep, allow_unused=True)
                yield {id(p): g for p, g in zip(parameters, grads, strict=True) if g is not None}

    def compute(self) -> dict[str, Values]:
        """Return the mean over batches of all processes.

        Raises:
            ValueError: the gradients were not finite.
        """
        ranks = gather_all((self.observed, {name: plain(values) for name, values in self.sums.items()}))
        number = sum(observed for observed, _ in ranks)
        means = {
            name: np.sum([sums[name] for _, sums in ranks], axis=0) / max(number, 1) for name in self.sums
        }
        bad = [name for name, values in means.items() if not np.isfinite(values).all()]
        if bad:
            raise ValueError(
                f"the gradients of the outputs at {bad[0]!r} were NaN or infinite; nothing was pruned"
            )
        return means if number else {}

    def state(self) -> dict[str, Any]:
        """Return the sums so far, for a checkpoint."""
        return {"sums": dict(self.sums), "observed": self.observed}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned.

        Raises:
            ValueError: the state belongs to other layers.
        """
        if state["sums"].keys() != self.sums.keys():
            raise ValueError(f"gradients of {sorted(state['sums'])}, but the layers are {sorted(self.sums)}")
        self.sums = {
            name: values.to(self.sums[name].device).clone() for name, values in state["sums"].items()
        }
        self.observed = state["observed"]


@dataclass(frozen=True)
class OutputTaylor:
    """First-order Taylor of the outputs on gates: ``sum over outputs f of (df/dz)^2`` at ``z = 1``.

    The diagonal of the Gauss-Newton matrix of the gates for a squared error of the outputs: how much these change
    when a unit goes, to first order. The gradients of the loss of a network that was trained to a plateau are mostly
    noise; those of its outputs are not. No labels are needed. Each observed batch costs one more forward and
    ``projections`` backwards.

    Args:
        projections: random projections of the outputs per batch, one backward each.
        batches: number of batches that are looked at.
        reduction: over the gates of a unit.
        normalise: ``"remaining"``, see :func:`~lightning_prune.criteria.reduction.remaining_shares`, ``"none"``, or
            by the mean over ``"layer"``, ``"group"`` or ``"global"``.
        seed: of the projections.

    Raises:
        ValueError: an argument is out of range; when called: there are no statistics.

    Example:
        >>> from lightning_prune import one_shot
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
        >>> record = one_shot(
        ...     net, torch.zeros(1, 1, 8, 8), {"macs": 0.5}, OutputTaylor(), [torch.randn(16, 1, 8, 8)]
        ... )
        >>> net[0].out_channels
        4
    """

    projections: int = 4
    batches: int = 8
    reduction: Reduction = "mean"
    normalise: Normalise = "remaining"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.projections, self.batches) < 1:
            raise ValueError(
                f"projections and batches must be at least 1, got {self.projections} and {self.batches}"
            )

    def observer(self, graph: ChannelGraph, model: nn.Module) -> Observer:
        """Return an observer of the gradients of the outputs."""
        return OutputGradients(graph, model, self.projections, self.batches, self.seed)

    def __call__(
        self, graph: ChannelGraph, model: nn.Module, statistics: Statistics = NO_STATISTICS
    ) -> Importance:
        """Return importance per unit, shape (num_units,)."""
        if not statistics:
            raise ValueError("OutputTaylor needs gradients of the outputs and got none: did any batch run?")
        units = {name: gate.units for name, gate in gates(graph, model).items()}
        pieces = [(units[name], statistics[name]) for name in units if name in statistics]
        return reduced(graph, pieces, self.reduction, self.normalise)
