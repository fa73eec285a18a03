"""Importance of residual blocks: what the network loses when a branch vanishes, measured on a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune.criteria.branch_watch import watched_branches
from lightning_prune.graph.residual_blocks import ResidualBlocks
from lightning_prune.tracing.calls import tensors_in
from lightning_prune.utils.arguments import check_choice
from lightning_prune.utils.example_inputs import inputs_of, on_device
from lightning_prune.utils.modules import training_modes

__all__ = ["BlockMethod", "block_scores"]

BlockMethod = Literal["outputs", "kl", "energy", "taylor"]
Loss = Callable[[nn.Module, Any], Tensor | None]


def block_scores(
    blocks: ResidualBlocks,
    batches: Sequence[Any],
    method: BlockMethod = "outputs",
    loss: Loss | None = None,
    without: Sequence[str] = (),
) -> dict[str, float]:
    """Return the importance of every block that may vanish; the least important one has the lowest number.

    The network runs in eval mode and is not changed.

    Args:
        blocks: of the network, see :func:`~lightning_prune.residual_blocks`.
        batches: a few, with or without labels, which only ``"taylor"`` looks at.
        method: ``"outputs"``: mean squared change of the network's outputs without the block, as a share of their
            variance (one forward for each block). ``"kl"``: Kullback-Leibler divergence of the class probabilities
            without the block from those with it, for outputs of logits along dimension 1. ``"energy"``: mean square
            of the branch as a share of that of the sum (one forward for all). ``"taylor"``: first-order change of
            the loss, ``|sum over the branch of gradient * value|``, averaged over the batches.
        loss: ``(network, batch) -> loss``, for ``"taylor"``.
        without: blocks that are taken to have vanished already.

    Raises:
        ValueError: there are no batches, the method is unknown, it needs a loss, or no batch fits the forward.

    Example:
        >>> from lightning_prune.classification.networks.cifar_resnet import CifarResNet
        >>> from lightning_prune.graph.block_search import residual_blocks
        >>> net, images = CifarResNet(depth=14, width=4), torch.rand(4, 1, 16, 16)
        >>> sorted(block_scores(residual_blocks(net, images), [images]))
        ['blocks.0', 'blocks.1', 'blocks.3', 'blocks.5']
    """
    check_choice("the score of blocks", method, get_args(BlockMethod))
    if not batches:
        raise ValueError("blocks are scored on batches: pass some, 64 images or more")
    names = [name for name in blocks if name not in without]
    if method == "taylor":
        if loss is None:
            raise ValueError("the score 'taylor' of blocks needs a loss: pass loss=")
        return _taylor(blocks, names, batches, loss, without)
    inputs = _inputs(blocks.model, batches)
    with torch.no_grad(), training_modes(blocks.model, lambda module: False):
        if method == "energy":
            return _energy(blocks, names, inputs, without)
        return _changes(blocks, names, inputs, _divergence if method == "kl" else _difference, without)


def _inputs(model: nn.Module, batches: Sequence[Any]) -> list[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    device = next(model.parameters()).device
    found = [inputs_of(on_device(batch, device), model.forward) for batch in batches]
    inputs: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = [each for each in found if each is not None]
    if not inputs:
        raise ValueError("no batch holds what the forward of the network takes")
    return inputs


def _severing(blocks: ResidualBlocks, names: Iterable[str]) -> AbstractContextManager[None]:
    """Return a context within which the branches of some blocks are zero."""
    return watched_branches(blocks, names, lambda name, stream, branch: torch.zeros_like(branch))


def _changes(
    blocks: ResidualBlocks,
    names: Sequence[str],
    inputs: Sequence[Any],
    change: Callable[[Sequence[Tensor], Sequence[Tensor]], float],
    without: Sequence[str],
) -> dict[str, float]:
    sums = dict.fromkeys(names, 0.0)
    for args, kwargs in inputs:
        with _severing(blocks, without):
            dense = _outputs(blocks.model, args, kwargs)
        for name in names:
            with _severing(blocks, [*without, name]):
                sums[name] += change(dense, _outputs(blocks.model, args, kwargs)) / len(inputs)
    return sums


def _outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(model(*args, **kwargs)) if tensor.is_floating_point()]


def _difference(dense: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the mean squared change of the outputs, as a share of their variance, averaged over the outputs."""
    shares = [
        float((a.float() - b.float()).square().mean() / a.float().var(correction=0).clamp_min(1e-12))
        for a, b in zip(dense, others, strict=True)
    ]
    return sum(shares) / max(len(shares), 1)


def _divergence(dense: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the Kullback-Leibler divergence of probabilities along dimension 1, averaged over positions."""
    if any(tensor.dim() < 2 for tensor in dense):
        raise ValueError(
            "the score 'kl' of blocks needs outputs with classes along dimension 1; take 'outputs'"
        )
    sums = [
        float((a.float().softmax(1) * (a.float().log_softmax(1) - b.float().log_softmax(1))).sum(1).mean())
        for a, b in zip(dense, others, strict=True)
    ]
    return sum(sums) / max(len(sums), 1)


def _energy(
    blocks: ResidualBlocks, names: Sequence[str], inputs: Sequence[Any], without: Sequence[str]
) -> dict[str, float]:
    sums = {name: [0.0, 0.0] for name in names}

    def add(name: str, stream: Tensor, branch: Tensor) -> Tensor | None:
        if name in without:
            return torch.zeros_like(branch)
        sums[name][0] += float(branch.float().square().sum())
        sums[name][1] += float((stream.float() + branch.float()).square().sum())
        return None

    for args, kwargs in inputs:
        with watched_branches(blocks, [*names, *without], add):
            blocks.model(*args, **kwargs)
    return {name: branch / max(total, 1e-12) for name, (branch, total) in sums.items()}


def _taylor(
    blocks: ResidualBlocks, names: Sequence[str], batches: Sequence[Any], loss: Loss, without: Sequence[str]
) -> dict[str, float]:
    device = next(blocks.model.parameters()).device
    gates = {name: torch.ones((), device=device, requires_grad=True) for name in names}
    sums = dict.fromkeys(names, 0.0)

    def gate(name: str, stream: Tensor, branch: Tensor) -> Tensor:
        return torch.zeros_like(branch) if name in without else branch * gates[name].to(branch.dtype)

    with training_modes(blocks.model, lambda module: False), torch.enable_grad():
        for batch in batches:
            with watched_branches(blocks, [*names, *without], gate):
                value = loss(blocks.model, on_device(batch, device))
            if value is None:
                continue
            slopes = torch.autograd.grad(value, list(gates.values()), allow_unused=True)
            for name, slope in zip(gates, slopes, strict=True):
                sums[name] += 0.0 if slope is None else abs(float(slope)) / len(batches)
    return sums
