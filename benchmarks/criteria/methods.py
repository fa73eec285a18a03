"""Methods of ``python -m benchmarks.criteria``: our criteria, and the pruner of torch-pruning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import lightning as L
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.criteria.tasks import Task
from lightning_prune import Limits, trace
from lightning_prune.criteria import (
    FPGM,
    IPAD,
    L1,
    L2,
    LAMP,
    ActivationMean,
    CostAware,
    Criterion,
    Normalised,
    NormScale,
    Propagated,
    Random,
    TaylorGate,
    TaylorWeight,
)
from lightning_prune.pruning.session import PruningSession
from lightning_prune.selection.dense_sizes import DenseSizes
from lightning_prune.selection.policy import PruningPolicy
from lightning_prune.utils.example_inputs import as_example

__all__ = ["METHODS", "Method"]

MAX_REMOVED = 0.88  # of a layer's channels, in all methods with limits: ours and theirs
ITERATIVE_STEPS = 500  # of torch-pruning, from the dense network to an empty one


class Method(Protocol):
    """Prunes the network of a task; before, it may collect statistics during training."""

    def callbacks(self) -> list[L.Callback]:
        """Return callbacks that collect statistics in the last epoch before a cut."""
        ...

    def cut(self, share: float) -> float:
        """Cut to a share of the dense MACs, and return the share that is reached."""
        ...


class Dense:
    """No pruning: shows the effect of the further epochs alone."""

    def callbacks(self) -> list[L.Callback]:
        return []

    def cut(self, share: float) -> float:
        return 1.0


class LastEpochStatistics(L.Callback):
    """Collects the statistics of a criterion in the last epoch of a fit, as ``FilterPruningCallback`` does."""

    def __init__(self, run: PruningSession, criterion: Criterion) -> None:
        self.run, self.criterion = run, criterion

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self.run.observe(self.criterion)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        self.run.on_step(optimizer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.run.set_observing(False)


class Ours:
    """One of our criteria, with our selection within limits."""

    def __init__(self, task: Task, criterion: Criterion) -> None:
        example = as_example(task.module.example_input_array)
        graph = trace(task.net, *example[0], **example[1])
        self.criterion = criterion
        self.run = PruningSession(task.net, example, graph, DenseSizes.of(graph))

    def callbacks(self) -> list[L.Callback]:
        return [LastEpochStatistics(self.run, self.criterion)]

    def cut(self, share: float) -> float:
        self.run.cut_(
            PruningPolicy({"macs": share}, limits=Limits(MAX_REMOVED, of="channels")), self.criterion
        )
        return self.run.graph.cost("macs") / self.run.dense.costs["macs"]


class Theirs:
    """The global pruner of torch-pruning, in small steps until the share of the MACs is reached."""

    def __init__(self, task: Task, importance: Callable[..., Any], most: float) -> None:
        self.task = task
        self.example = task.module.example_input_array
        self.dense_macs = self._macs()
        self.pruner = tp.pruner.BasePruner(
            task.net,
            self.example,
            importance,
            global_pruning=True,
            pruning_ratio=1.0,
            max_pruning_ratio=most,
            iterative_steps=ITERATIVE_STEPS,
            ignored_layers=[task.net.get_submodule(name) for name in task.outputs],
        )
        self.needs_gradients = isinstance(importance, tp.importance.GroupTaylorImportance)

    def callbacks(self) -> list[L.Callback]:
        return []

    def cut(self, share: float) -> float:
        if self.needs_gradients:
            self._accumulate()
        while self._macs() > share * self.dense_macs and self.pruner.current_step < ITERATIVE_STEPS:
            self.pruner.step()
        self.task.net.zero_grad(set_to_none=True)
        return self._macs() / self.dense_macs

    def _macs(self) -> int:
        """Return the MACs, counted like ours but without our trace."""
        return conv_macs(self.task.net, self.example)

    def _accumulate(self) -> None:
        """Accumulate the gradient of the training data in one pass, as torch-pruning's documentation shows."""
        self.task.net.train()
        self.task.net.zero_grad()
        for image, target, *_ in self.task.train:
            F.cross_entropy(self.task.net(image), target).backward()


def conv_macs(net: nn.Module, example: Any) -> int:
    """Return the multiply-accumulates of convolutions and linear layers in one forward."""
    macs = []

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        weight = module.get_parameter("weight")
        macs.append(weight[0].numel() * output[0].numel())

    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    mode = net.training
    net.eval()(example)
    net.train(mode)
    for hook in hooks:
        hook.remove()
    return sum(macs)


def ours(make: Callable[[int], Criterion]) -> Callable[[Task, int], Method]:
    return lambda task, seed: Ours(task, make(seed))


def theirs(make: Callable[[], Callable[..., Any]], most: float = 1.0) -> Callable[[Task, int], Method]:
    return lambda task, seed: Theirs(task, make(), most)


TP_L2, TP_TAYLOR = tp.importance.GroupMagnitudeImportance, tp.importance.GroupTaylorImportance
METHODS: dict[str, Callable[[Task, int], Method]] = {
    "dense": lambda task, seed: Dense(),
    "random": ours(Random),
    "IPAD, omega 1": ours(lambda _: IPAD(1.0)),
    "IPAD, omega 0.5": ours(lambda _: IPAD(0.5)),
    "IPAD, omega 0": ours(lambda _: IPAD(0.0)),
    "IPAD, omega 0.5, global": ours(lambda _: IPAD(0.5, scale="global")),
    "L1": ours(lambda _: L1()),
    "L2": ours(lambda _: L2()),
    "L2, by layer": ours(lambda _: L2(normalise="layer")),
    "L2, bound, by group": ours(lambda _: L2(scope="bound", normalise="group")),
    "FPGM": ours(lambda _: FPGM()),
    "LAMP": ours(lambda _: LAMP()),
    "norm scale": ours(lambda _: NormScale()),
    "Taylor, weights": ours(lambda _: TaylorWeight()),
    "Taylor, gates": ours(lambda _: TaylorGate()),
    "activation mean, by layer": ours(lambda _: Normalised(ActivationMean(), "layer")),
    "propagated IPAD": ours(lambda _: Propagated(IPAD(1.0))),
    "IPAD, cost-aware": ours(lambda _: CostAware(IPAD(1.0), gamma=0.5)),
    "Taylor, gates, cost-aware": ours(lambda _: CostAware(TaylorGate(), gamma=1.0)),
    "torch-pruning L2": theirs(TP_L2),
    "torch-pruning Taylor": theirs(TP_TAYLOR),
    "torch-pruning L2, limits": theirs(TP_L2, MAX_REMOVED),
    "torch-pruning Taylor, limits": theirs(TP_TAYLOR, MAX_REMOVED),
}
