"""Small networks to slim, and trainers for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ChannelGraph, SlimmingCallback, trace
from lightning_prune.segmentation.networks.atom_mobile import AtomMobile
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.limits import Limits
from lightning_prune.selection.plan import Plan
from lightning_prune.slimming.penalty import channel_costs, slimmable
from lightning_prune.slimming.policy import SlimmingPolicy, scale_sizes
from lightning_prune.tracing.ids import Units

QUIET = [
    pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|LeafSpec|logging interval)"),
    pytest.mark.filterwarnings("ignore:.*(resuming from a checkpoint|exists and is not empty|not met)"),
]


def small_net() -> nn.Sequential:
    """Return a classifier of images (n, 1, 12, 12) with two batch norms; its weights are always the same."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, stride=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def loader(number: int = 32, size: int = 12, batch: int = 4) -> DataLoader:
    """Return images with noise, whose mean is their label."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(number) % 4
    x = torch.randn(number, 1, size, size, generator=generator) + y[:, None, None, None]
    return DataLoader(TensorDataset(x, y), batch)


def penalty_as_loss_term(net: nn.Module) -> Tensor:
    """Return the penalty as a differentiable term of the loss, which the callback replaces."""
    graph = trace(net, torch.zeros(1, 1, 12, 12))
    p = channel_costs(graph, slimmable(graph, net))
    return torch.stack([(torch.tensor(p[name]) * net.get_parameter(name).abs()).sum() for name in p]).sum()


class Small(L.LightningModule):
    """A classifier that can add the penalty to its own loss, and stores the gradients of each optimizer step."""

    def __init__(self, rho: float = 0.0, optimizer: Any = None) -> None:
        super().__init__()
        self.net = small_net()
        self.rho, self.optimizer = rho, optimizer
        self.grads: list[list[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        return loss + self.rho * penalty_as_loss_term(self.net) if self.rho else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append([p.grad.clone() for p in self.net.parameters() if p.grad is not None])

    def configure_optimizers(self) -> Any:
        return (self.optimizer or (lambda p: torch.optim.AdamW(p, 1e-2)))(self.parameters())


def sgd(lr: float = 0.0) -> Any:
    """Return ``parameters -> SGD``; with a learning rate of 0 no parameter changes."""
    return lambda parameters: torch.optim.SGD(parameters, lr)


def fit(module: L.LightningModule, *callbacks: L.Callback, epochs: int = 1, **options: Any) -> L.Trainer:
    """Train on the CPU without output; return the trainer."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    data, resume = options.pop("data", None), options.pop("ckpt_path", None)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **{**quiet, **options}
    )
    trainer.fit(module, loader() if data is None else data, ckpt_path=resume)
    return trainer


def slimming(**options: Any) -> SlimmingCallback:
    """Return a silent callback for the submodule ``net``."""
    return SlimmingCallback(**{"verbose": False, "submodule": "net", **options})


def set_small_scales(net: nn.Module, size: float, every: int = 2) -> nn.Module:
    """Set every other scale of each batch norm to ``size``, its shifts and running statistics to random values."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data[::every] = size
            module.bias.data = torch.randn(module.bias.shape, generator=generator)
            module.running_mean = torch.randn(module.bias.shape, generator=generator)
            module.running_var = torch.rand(module.bias.shape, generator=generator) + 0.5
    return net.eval()


def plan_small_scales(
    net: nn.Module, example: Tensor, norms: Sequence[str] = (), threshold: float = 1e-3
) -> tuple[ChannelGraph, dict[str, Units], Plan]:
    """Return the graph, the slimmed scales, and the plan that removes the units at or below the threshold."""
    graph = trace(net, example)
    scales = slimmable(graph, net, norms=norms)
    sizes = scale_sizes(graph, scales, [{name: net.get_parameter(name) for name in scales}])
    policy = SlimmingPolicy({}, limits=Limits(1.0, min_channels=1), threshold=threshold)
    return graph, scales, policy.plan(graph, sizes, DenseSizes.of(graph))


# -- branches --------------------------------------------------------------------------------------------------


def atom_mobile_net(dead: Sequence[tuple[int, int, int]]) -> AtomMobile:
    """Return a network whose depthwise scales are 0 in the branches ``dead``: (stage, block, branch) of each."""
    torch.manual_seed(0)
    net = AtomMobile(classes=3, width=0.5).eval()
    for stage, block, branch in dead:
        norm = net.stages[stage][block].branches[branch].depthwise[1]
        norm.weight.data.zero_()
        norm.bias.data.normal_()
    return net


class ParallelBranches(nn.Module):
    """Parallel branches that one convolution reads; branches without channels are skipped."""

    def __init__(self, width: int = 4, kernels: Sequence[int] = (1, 3, 5)) -> None:
        super().__init__()
        branches = (
            nn.Sequential(nn.Conv2d(1, width, k, padding=k // 2), nn.BatchNorm2d(width), nn.ReLU())
            for k in kernels
        )
        self.branches = nn.ModuleList(branches)
        self.join = nn.Conv2d(len(kernels) * width, 6, 1)

    @property
    def optional_parts(self) -> list[nn.Module]:
        return list(self.branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([b(x) for b in self.branches if b[0].weight.numel()], 1))


def parallel_branches_net(*dead: int) -> nn.Sequential:
    """Return a classifier with parallel branches; the scales of the branches ``dead`` are 0."""
    torch.manual_seed(0)
    parallel = ParallelBranches()
    for index in dead:
        parallel.branches[index][1].weight.data.zero_()
    return nn.Sequential(parallel, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def alive_branches(net: AtomMobile) -> list[tuple[int, int, int]]:
    """Return stage, block and branch of each branch that has channels."""
    return [
        (s, b, k)
        for s, stage in enumerate(net.stages)
        for b, block in enumerate(stage)
        for k, branch in enumerate(block.branches)
        if branch.alive
    ]
