"""Blocks whose sizes or branches depend on values: selections, experts, branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from tests.support.random_nets.registry import Body, Shape, block, chain, fit, pick, shape_after

SELECTIONS = [
    "mask", "mask_write", "nonzero", "where", "masked_select", "topk", "sort", "nms", "unique", "loop", "each_image",
]  # fmt: skip


def ranks(like: Tensor) -> Tensor:
    """Return small, different numbers, which decide between positions of equal scores."""
    return torch.linspace(0, 0.01, like.shape[1], dtype=like.dtype)


@block(how=pick(SELECTIONS), score=pick(["conv", "sum"]))
class Select(nn.Module):
    """Change the pixels, and only those, that a score of theirs selects."""

    def __init__(self, shape: Shape, how: str, score: str) -> None:
        super().__init__()
        self.how, self.count = how, max(shape[1] * shape[2] // 2, 1)
        self.score = nn.Linear(shape[0], 1) if score == "conv" else None
        self.linear = nn.Linear(shape[0], shape[0])
        self.boxes = nn.Linear(shape[0], 4) if how == "nms" else nn.Identity()

    def scores(self, tokens: Tensor) -> Tensor:
        """Return a score per token, shape (b, n)."""
        scores = tokens.sum(-1) if self.score is None else self.score(tokens)[..., 0]
        return scores - 0.05 + ranks(scores)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        if self.how == "nms":
            return x * self.of_boxes(tokens)[..., None, None]
        change = self.in_order if self.how in ("topk", "sort") else self.of_each
        change = self.of_all if self.how not in ("topk", "sort", "each_image") else change
        return change(tokens).transpose(1, 2).reshape(x.shape)

    def of_boxes(self, tokens: Tensor) -> Tensor:
        """Return a gate per channel from the pixels that non-maximum suppression keeps, shape (b, c)."""
        corners = self.boxes(tokens).cumsum(-1)
        boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:].abs()], -1)
        kept = [nms(box, score, 0.3) for box, score in zip(boxes, self.scores(tokens), strict=True)]
        pooled = [image[rows].sum(0) for image, rows in zip(tokens, kept, strict=True)]
        return self.linear(torch.stack(pooled)).sigmoid()

    def in_order(self, tokens: Tensor) -> Tensor:
        """Change the tokens of the highest scores, or all of them in the order of their scores."""
        scores = self.scores(tokens)
        order = scores.topk(self.count, 1)[1] if self.how == "topk" else scores.argsort(1)
        order = order[..., None].expand(-1, -1, tokens.shape[2])
        return tokens.scatter(1, order, self.linear(tokens.gather(1, order)))

    def of_each(self, tokens: Tensor) -> Tensor:
        """Change each image by itself."""
        images = []
        for image, score in zip(tokens.unbind(0), self.scores(tokens), strict=True):
            rows = (score > 0).nonzero()[:, 0]
            images.append(image.index_add(0, rows, self.linear(image[rows])))
        return torch.stack(images)

    def of_all(self, tokens: Tensor) -> Tensor:
        """Change the chosen tokens of all images together."""
        flat, scores = tokens.flatten(0, 1), self.scores(tokens).flatten()
        chosen = scores > 0
        if self.how == "mask":
            return (
                torch.zeros_like(flat)
                .masked_scatter(chosen[:, None], self.linear(flat[chosen]))
                .view_as(tokens)
            )
        if self.how == "masked_select":
            taken = flat.masked_select(chosen[:, None]).view(-1, flat.shape[1])
            return flat.index_put((chosen,), self.linear(taken)).view_as(tokens)
        if self.how == "mask_write":
            flat = flat.clone()
            flat[chosen] = self.linear(flat[chosen])
            return flat.view_as(tokens)
        if self.how == "unique":
            rows = torch.unique((scores * 4).round(), return_inverse=True)[1]
            sums = torch.zeros(int(rows.max()) + 1, flat.shape[1], dtype=flat.dtype).index_add(0, rows, flat)
            return self.linear(sums)[rows].view_as(tokens)
        if self.how == "loop":
            for _ in range(int(chosen.sum()) % 3):
                flat = flat + self.linear(flat).tanh()
            return flat.view_as(tokens)
        rows = chosen.nonzero().flatten() if self.how == "nonzero" else torch.where(chosen)[0]
        return torch.zeros_like(flat).index_copy(0, rows, self.linear(flat[rows])).view_as(tokens)


@block(number=pick([2, 3]), hidden=pick([3, 5]), style=pick(["all", "skip", "mask", "dense", "two"]))
class Experts(nn.Module):
    """Mixture of experts: each pixel passes through the experts that a router chooses."""

    def __init__(self, shape: Shape, number: int, hidden: int, style: str) -> None:
        super().__init__()
        self.style, self.router = style, nn.Linear(shape[0], number)
        experts = [
            (nn.Linear(shape[0], hidden), nn.ReLU(), nn.Linear(hidden, shape[0])) for _ in range(number)
        ]
        self.experts = nn.ModuleList(nn.Sequential(*layers) for layers in experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(0, 2, 3, 1).flatten(0, 2)
        return self.mixed(tokens).reshape(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)

    def mixed(self, tokens: Tensor) -> Tensor:
        shares = self.router(tokens).softmax(-1)
        if self.style == "dense":
            outs = torch.stack([expert(tokens) for expert in self.experts], -1)
            return (outs * shares[:, None]).sum(-1)
        best, choice = shares.topk(2 if self.style == "two" else 1, -1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(choice == number)
            if self.style == "skip" and not len(rows):
                continue
            if self.style == "mask":
                chosen = choice[:, 0] == number
                out[chosen] = expert(tokens[chosen]) * best[chosen]
            else:
                out.index_add_(0, rows, expert(tokens[rows]) * best[rows, places, None])
        return out


BRANCHES = ["value", "item", "any", "skip", "shape", "training", "channels", "random"]


@block(bodies=2, style=pick(BRANCHES))
class Branch(nn.Module):
    """Take one of two bodies: by a value, a size, or the mode."""

    def __init__(self, shape: Shape, first: Body, second: Body, style: str) -> None:
        super().__init__()
        self.style, self.gate = style, nn.Conv2d(shape[0], 1, 1)
        self.a, self.b = chain(first, shape), chain(second, shape)
        wide, other = shape_after(self.a, shape)[0], shape_after(self.b, shape)[0]
        self.match = nn.Conv2d(other, wide, 1) if wide != other else nn.Identity()
        self.skip = nn.Conv2d(shape[0], wide, 1)
        self.usual = max(shape[0] - 1, 1)

    def takes_first(self, x: Tensor) -> bool:
        if self.style in ("value", "skip"):
            return bool(self.gate(x).mean() > 0)
        if self.style == "item":
            return self.gate(x).mean().item() > 0
        if self.style == "any":
            return bool((self.gate(x) > 1).any())
        if self.style == "random":
            return not (self.training and torch.rand(()) < 0.5)
        sizes = {"shape": x.shape[3] < 5, "channels": x.shape[1] > int(self.usual)}
        return sizes.get(self.style, self.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.skip(x)
        if self.takes_first(x):
            return y + fit(self.a(x.clone()), y)
        return y if self.style == "skip" else y + fit(self.match(self.b(x.clone())), y)
