"""Activation deviation: the distance of each channel's mean map from the mean map of its layer."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["ActivationDeviation", "Form", "activation_deviation", "check_form"]

Form = Literal["fair", "published"]


def activation_deviation(
    mean_map: Tensor, p: int = 1, form: Form = "fair", positions: float | None = None
) -> Tensor:
    """Return the distance of each channel's mean map from the layer's mean map (Vitek et al., 2023).

    ``D_k = A_k - mean_c A``; then ``mean |D_k|`` for ``p=1`` and ``sqrt(mean D_k^2)`` for ``p=2``. The
    published code divides ``sqrt(sum D_k^2)`` by ``h * w``, which scores the same map 16 times lower at
    640x400 than at 40x25; that is ``form="published"``.

    Args:
        mean_map: A, the mean over the data of a layer's output before normalisation, shape (C, positions).
        p: 1 or 2.
        form: ``"fair"`` or, for ``p=2``, ``"published"``.
        positions: ``h * w`` of the original map, if ``mean_map`` is a coarser one.

    Returns:
        The deviation of each channel, shape (C,).

    Example:
        >>> activation_deviation(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
        tensor([1., 1.])
    """
    deviation = mean_map - mean_map.mean(0)
    if p == 1:
        return deviation.abs().mean(1)
    fair = deviation.square().mean(1).sqrt()
    return fair if form == "fair" else fair / (positions or mean_map.shape[1]) ** 0.5


def check_form(p: int, form: str) -> None:
    """Raise ValueError unless ``p`` and ``form`` name a deviation that exists."""
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    if form not in get_args(Form):
        raise ValueError(f"deviation must be 'fair' or 'published', got {form!r}")


def coarse_shape(activation: Tensor, grid: int | None) -> tuple[int, int]:
    """Return the cells along height and width on which the mean map of ``activation`` (N, C, ...) is stored."""
    *outer, width = activation.shape[2:] or (1,)
    height = int(np.prod(outer, dtype=np.int64))
    return (height, width) if grid is None else (min(height, grid), min(width, grid))


def summed_map(activation: Tensor, cells: tuple[int, int]) -> Tensor:
    """Sum ``activation`` (N, C, ...) over its samples and average it into ``cells``: (C, cells) in float32.

    This is the only pass over the data; all that follows works on a single map.
    """
    total = activation.sum(0, dtype=torch.float32)
    planes = total.reshape(len(total), -1, total.shape[-1] if total.dim() > 1 else 1)
    if planes.shape[1:] != cells:
        planes = nn.functional.adaptive_avg_pool2d(planes, cells)
    return planes.reshape(len(planes), -1)


class ActivationDeviation(Metric):
    """Metric: activation deviation of one layer's channels over all data, in O(C) memory.

    The formula (:func:`activation_deviation`) asks for A, the mean over *all* data of maps of C x h x w
    numbers. Deviations averaged over batches would need less, but they measure something else (by the
    triangle inequality never less than the formula, and more the smaller the batch), and would depend on how
    batches are cut or spread over processes. Instead the mean map itself is kept, on at most ``grid x grid``
    cells. Averaging into cells is linear, so this is the formula applied to the pooled mean map: exactly the
    formula where ``h, w <= grid``, and a lower bound of it otherwise (structure of the mean map finer than a
    cell is averaged out; cells are equal, and the bound strict, where the grid divides the size). It does not
    depend on batch size, order or number of processes. ``grid=None`` keeps the whole map, and is the formula
    everywhere at O(C*h*w). On brain slices of 96x96 and a U-Net, units rank as by the whole map with a
    correlation of 0.9999 for 16 cells per side, 0.999 for 8.

    Maps with one dimension or none (tokens, linear layers) form one line of cells; in three dimensions, depth is
    merged with height.

    Args:
        p: 1 for ``mean |D|``, 2 for ``sqrt(mean D^2)``.
        form: ``"fair"``, or ``"published"`` for the division by ``h * w`` of the original code (``p=2``).
        grid: cells per side, or ``None`` for the exact form.
        kwargs: as of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: an argument is out of range; in the exact form, a map changes its size.

    Example:
        >>> metric = ActivationDeviation()
        >>> metric.update(torch.tensor([[[[1.0, 3.0]], [[3.0, 1.0]]]]))
        >>> metric.compute()
        tensor([1., 1.])
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    samples: Tensor
    positions: Tensor

    def __init__(self, p: int = 1, form: Form = "fair", grid: int | None = 16, **kwargs: Any) -> None:
        check_form(p, form)
        if grid is not None and grid < 1:
            raise ValueError(f"grid must be at least 1, or None for the exact form, got {grid}")
        super().__init__(**kwargs)
        self.p, self.form, self.grid = p, form, grid
        self.cells: tuple[int, int] | None = None
        self.add_state("total", torch.zeros(0), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("positions", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, activation: Tensor) -> None:
        """Add one batch of a layer's output, shape (N, C) or (N, C, ...)."""
        activation = activation.detach()
        cells = self.cells or self._start(activation)
        if self.grid is None and coarse_shape(activation, None) != cells:
            sizes = f"{cells}, then {tuple(activation.shape[2:])}"
            raise ValueError(f"the exact form needs maps of one size, got {sizes}; set a grid")
        # New tensors, since LayerMetrics.rewind goes back to the old ones.
        self.total = self.total + summed_map(activation, cells)
        self.samples = self.samples + len(activation)
        self.positions = self.positions + len(activation) * int(np.prod(activation.shape[2:], dtype=np.int64))

    def compute(self) -> Tensor:
        """Return the deviation of each channel, shape (C,)."""
        mean_map = self.total / self.samples
        positions = self.positions.item() / self.samples.item()
        return activation_deviation(mean_map, self.p, self.form, positions)

    def conform_(self, shape: tuple[int, int, int]) -> None:
        """Resize the map to ``shape`` (channels, cells) of another process, or create a map of zeros."""
        channels, *cells = shape
        if self.cells is None:
            self.total = self.total.new_zeros(channels, cells[0] * cells[1])
        elif self.cells != tuple(cells):
            self.total = summed_map(self.total.reshape(1, channels, *self.cells), (cells[0], cells[1]))
        self.cells = cells[0], cells[1]

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Channels and cells along height and width; None before the first batch."""
        return None if self.cells is None else (len(self.total), *self.cells)

    def reset(self) -> None:
        """Discard all state, the number of channels and the size of the map included."""
        super().reset()
        self.cells = None

    def get_extra_state(self) -> list[int] | None:
        """Return the cells, which belong to the sums in a checkpoint."""
        return None if self.cells is None else list(self.cells)

    def set_extra_state(self, state: list[int] | None) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        self.cells = None if state is None else (state[0], state[1])

    def _start(self, activation: Tensor) -> tuple[int, int]:
        """Fix the cells by the first batch and allocate the sums."""
        self.cells = height, width = coarse_shape(activation, self.grid)
        shape = (activation.shape[1], height * width)
        self.total = torch.zeros(shape, dtype=torch.float32, device=activation.device)
        return self.cells
