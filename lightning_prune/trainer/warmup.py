"""Warm-up: lower learning rates in the first optimizer steps after a cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["Warmup"]


class Warmup:
    """Scale the learning rates of the first optimizer steps after a cut, whatever scheduler sets them.

    Step ``k`` (from 0) of ``steps`` uses ``(k + 1) / (steps + 1)`` of the learning rate, later ones all of it. Hooks
    of the optimizers change the rate before a step and restore it after the step. So schedulers, checkpoints and
    monitors of the learning rate see the rate without warm-up. Each optimizer counts its own steps; accumulated
    batches are one step.

    Args:
        steps: number of optimizer steps with a lower rate; 0: no warm-up.

    Raises:
        ValueError: ``steps`` is negative.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer, warmup = torch.optim.SGD([weight], lr=1.0), Warmup(3)
        >>> warmup.start()
        >>> warmup.attach([optimizer])
        >>> for _ in range(5):
        ...     weight.grad = torch.ones(1)
        ...     before = weight.item()
        ...     optimizer.step()
        ...     print(before - weight.item(), optimizer.param_groups[0]["lr"])
        0.25 1.0
        0.5 1.0
        0.75 1.0
        1.0 1.0
        1.0 1.0
    """

    def __init__(self, steps: int) -> None:
        if steps < 0:
            raise ValueError(f"the warm-up needs 0 steps or more, got lr_warmup_steps={steps}")
        self.steps = steps
        # Steps of each optimizer since the cut; None: no warm-up in progress.
        self._done: list[int] | None = None
        self._attached: list[tuple[Optimizer, list[RemovableHandle]]] = []
        self._rates: dict[int, list[Any]] = {}  # number of an optimizer in its step -> its learning rates

    def start(self) -> None:
        """Begin a warm-up with the next step of each optimizer."""
        self._done = [] if self.steps else None

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Have the steps of these optimizers use lower rates while a warm-up is in progress."""
        if self._done is None or min(self._done, default=0) >= self.steps:
            self._done = None
            self.detach()
            return
        self._done += [0] * (len(optimizers) - len(self._done))
        if [id(optimizer) for optimizer, _ in self._attached] != list(map(id, optimizers)):
            self.detach()
            self._attached = [
                (optimizer, self._hooks(number, optimizer)) for number, optimizer in enumerate(optimizers)
            ]

    def detach(self) -> None:
        """Remove all hooks, and restore the rates of a step that an exception has ended."""
        for number, (optimizer, handles) in enumerate(self._attached):
            self._restore(number, optimizer)
            for handle in handles:
                handle.remove()
        self._attached = []

    def state(self) -> list[int] | None:
        """Return the steps of each optimizer since the cut, for a checkpoint; None if there is no warm-up."""
        return None if self._done is None else list(self._done)

    def load(self, state: Sequence[int] | None) -> None:
        """Restore the result of :meth:`state`."""
        self._done = None if state is None or not self.steps else list(state)

    def _hooks(self, number: int, optimizer: Optimizer) -> list[RemovableHandle]:
        return [
            optimizer.register_step_pre_hook(lambda step, *_: self._scale(number, step)),
            optimizer.register_step_post_hook(lambda step, *_: self._end_step(number, step)),
        ]

    def _scale(self, number: int, optimizer: Optimizer) -> None:
        if self._done is None or self._done[number] >= self.steps:
            return
        factor = (self._done[number] + 1) / (self.steps + 1)
        self._rates[number] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor  # a new tensor where the rate is one

    def _end_step(self, number: int, optimizer: Optimizer) -> None:
        self._restore(number, optimizer)
        if self._done is not None:
            self._done[number] += 1

    def _restore(self, number: int, optimizer: Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates.pop(number, ()), strict=False):
            group["lr"] = rate
