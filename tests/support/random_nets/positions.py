"""Blocks with operators that select, order, transform or write along positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, roi_align

from tests.support.random_nets.registry import Shape, block, divisor, pick


def backwards(tokens: Tensor) -> Tensor:
    """Return the positions in reverse, of the shape of ``tokens`` (b, n, c)."""
    return torch.arange(tokens.shape[1]).flip(0)[None, :, None].expand_as(tokens)


#: on tokens of shape (b, n, c)
ALONG: dict[str, Callable[[Tensor], Tensor]] = {
    "gather": lambda t: t.gather(1, backwards(t)),
    "own_order": lambda t: t.gather(1, t.argsort(1)),
    "take_along": lambda t: torch.take_along_dim(t, t.argsort(1, descending=True), 1),
    "sort": lambda t: t.sort(1)[0],
    "topk": lambda t: F.pad(
        t.topk(max(t.shape[1] // 2, 1), 1)[0], (0, 0, 0, t.shape[1] - max(t.shape[1] // 2, 1))
    ),
    "scatter": lambda t: torch.zeros_like(t).scatter(1, backwards(t), t),
    "scatter_add": lambda t: t.scatter_add(1, torch.zeros_like(t).long(), t),
    "scatter_reduce": lambda t: t.scatter_reduce(1, torch.zeros_like(t).long(), t, "sum"),
    "index_add": lambda t: t.index_add(1, torch.tensor([0]), t[:, -1:]),
    "index_copy": lambda t: t.index_copy(1, torch.tensor([0]), t[:, -1:] * 2),
    "index_fill": lambda t: t.index_fill(1, torch.tensor([0]), 0),
    "index_select": lambda t: t.index_select(1, torch.arange(t.shape[1]).flip(0)),
    "random_order": lambda t: t[:, torch.arange(t.shape[1]).roll(2)],
    "cumsum": lambda t: t.cumsum(1),
    "cumprod": lambda t: t.cumprod(1),
    "cummax": lambda t: t.cummax(1)[0],
    "diff": lambda t: torch.diff(t, dim=1, prepend=t[:, :1]),
    "quantile": lambda t: t - t.quantile(0.5, 1, keepdim=True),
    "median": lambda t: t - t.median(1, keepdim=True)[0],
    "kthvalue": lambda t: t - t.kthvalue(1, 1, keepdim=True)[0],
    "argmax": lambda t: t.gather(1, t.argmax(1, keepdim=True)) + t,
    "own_mask": lambda t: t.masked_fill(t < 0.1, 0.0),
    "where": lambda t: torch.where(t > t.mean(1, keepdim=True), t, t * 0.1),
    "softmax": lambda t: t * t.softmax(1),
    "pad_sequence": lambda t: nn.utils.rnn.pad_sequence(list(t), batch_first=True),
    "images": lambda t: torch.stack([image.flip(0) for image in t]),
    "roll": lambda t: t.roll(1, 1),
}
#: on images
OF_IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "fft": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:]),
    "fft_real": lambda x: torch.view_as_real(torch.fft.rfft2(x)).sum(-1),
    "fft_magnitude": lambda x: torch.fft.fft2(x).abs() * 0.1,
    "blur": lambda x: F.conv2d(
        x.reshape(-1, 1, *x.shape[2:]), torch.full((1, 1, 3, 3), 0.1, dtype=x.dtype), padding=1
    ).reshape(x.shape),
    "grid_sample": lambda x: F.grid_sample(
        x, F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(x.shape[0], 2, 3), [x.shape[0], 1, 3, 3], False),
        align_corners=False,
    ),
    "roi_align": lambda x: roi_align(x, [torch.tensor([[0.0, 0.0, 2.0, 2.0]], dtype=x.dtype)] * x.shape[0], 2),
    "unfold_fold": lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1) * 0.1,
}  # fmt: skip
WRITES = ["number", "rows", "copied", "add_", "index_put"]


@block(how=pick([*sorted(ALONG), *sorted(OF_IMAGES), *WRITES]))
class Positions(nn.Module):
    def __init__(self, shape: Shape, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how in OF_IMAGES:
            return OF_IMAGES[self.how](x)
        if self.how in ALONG:
            return ALONG[self.how](x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
        y = x.clone()
        if self.how == "number":
            y[:, :, 0] = 0
        elif self.how == "rows":
            y[:, :, :1] = x[:, :, -1:] * 2
        elif self.how == "copied":
            y[..., 0].copy_(x[..., -1])
        elif self.how == "add_":
            y[:, :, 0] += x[:, :, -1]
        else:
            y[:, :, torch.tensor([0])] = x[:, :, -1:]
        return y


@block(how=pick(["cdist", "attention", "similarity"]))
class Distances(nn.Module):
    """Mix pixels by the distances of their channels."""

    def __init__(self, shape: Shape, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2).transpose(1, 2)
        if self.how == "cdist":
            weights = (-torch.cdist(t, t, p=1)).softmax(-1)
        elif self.how == "attention":
            weights = (t @ t.mT).softmax(-1)
        else:
            weights = torch.einsum("bnc,bmc->bnm", t, t).relu() / t.shape[1]
        return (weights @ t).transpose(1, 2).reshape(x.shape)


@block(groups=pick([1, 1, 2]), offsets=pick([1, 1, 2]), masked=pick([True, False]))
class Deformable(nn.Module):
    def __init__(self, shape: Shape, groups: int, offsets: int, masked: bool) -> None:
        super().__init__()
        groups, offsets = divisor(shape[0], groups), divisor(shape[0], offsets)
        self.conv = DeformConv2d(shape[0], 2 * groups, 3, padding=1, groups=groups)
        self.offset = nn.Conv2d(shape[0], 18 * offsets, 3, padding=1)
        self.mask = nn.Conv2d(shape[0], 9 * offsets, 3, padding=1) if masked else None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offset(x), None if self.mask is None else self.mask(x).sigmoid())
