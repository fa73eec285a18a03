"""torch-pruning as its users run it, with the floors of all other methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.quality.networks import Floors
from benchmarks.quality.tasks import Task

__all__ = ["TorchPruning"]

STEPS = 200  # from the dense network to an empty one


def forward_macs(net: nn.Module, example: Tensor) -> int:
    """Return the multiply-accumulates of one forward, counted like ours but without our trace."""
    counts: list[int] = []

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        counts.append(module.get_parameter("weight")[0].numel() * output[0].numel())

    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        net(example)
    for hook in hooks:
        hook.remove()
    return sum(counts)


class TorchPruning:
    """A pruner of torch-pruning, in small steps until the MACs are reached.

    ``max_pruning_ratio`` keeps one channel fewer than our limit of the same share (16 -> 1, ours 2). So the floors
    are applied here: of each group that the pruner offers, no more goes than the floors allow.

    Args:
        net: cut in place.
        task: gives example, batches and layers of the logits.
        floors: channels that each layer keeps at least.
        everywhere: rank all layers together; the library's default is each layer alone.
        sparsity: use ``GroupNormPruner`` and its penalty in training.
    """

    def __init__(
        self, net: nn.Module, task: Task, floors: Floors, everywhere: bool = False, sparsity: bool = False
    ) -> None:
        self.net, self.task, self.needs_sparsity = net, task, sparsity
        layers = {name: module for name, module in net.named_modules() if name in floors}
        self.floors: Mapping[nn.Module, int] = {module: floors[name] for name, module in layers.items()}
        pruner = tp.pruner.GroupNormPruner if sparsity else tp.pruner.BasePruner
        self.pruner = pruner(
            net,
            task.example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=everywhere,
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=[list(layers.values())[-1]],
        )

    def cut(self, macs: float, stage: int) -> int:
        """Cut to ``macs``; without any training step."""
        self.net.eval()
        while forward_macs(self.net, self.task.example) > macs and self.pruner.current_step < STEPS:
            for group in self.pruner.step(interactive=True):
                self._prune(group)
        self.pruner.update_regularizer()
        return 0

    def before_step(self) -> None:
        """Add the gradient of the penalty."""
        if self.needs_sparsity:
            self.pruner.regularize(self.net)

    def _prune(self, group: tp.Group) -> None:
        """Prune as much of a group as the floors of its layers allow."""
        dependency, indices = group[0]
        outputs = [
            dep.target.module for dep, _ in group if self.pruner.DG.is_out_channel_pruning_fn(dep.handler)
        ]
        room = min(
            (self.pruner.DG.get_out_channels(m) - self.floors[m] for m in outputs if m in self.floors),
            default=0,
        )
        if room < len(indices):
            indices = indices[: max(0, room)]
            if not indices:
                return
            group = self.pruner.DG.get_pruning_group(dependency.target.module, dependency.handler, indices)
        group.prune()
