"""The criteria of ``python -m benchmarks.criteria``: ours through the engine, torch-pruning's through its pruner."""

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

MOST = 0.88  # of a layer's channels may go, in every method with limits: ours and theirs
FINENESS = 500  # steps of torch-pruning from whole to nothing


class Method(Protocol):
    """Prunes the network of a task: looks on while it trains, then cuts."""

    def callbacks(self) -> list[L.Callback]:
        """What looks on during the last epoch before a cut."""
        ...

    def cut(self, share: float) -> float:
        """Cut to a share of the dense MACs; returns the share that is left."""
        ...


class Dense:
    """No pruning: what the further epochs alone do."""

    def callbacks(self) -> list[L.Callback]:
        return []

    def cut(self, share: float) -> float:
        return 1.0


class Look(L.Callback):
    """Lets the criterion see the last epoch of a fit, as ``FilterPruningCallback`` does."""

    def __init__(self, run: PruningSession, criterion: Criterion) -> None:
        self.run, self.criterion = run, criterion

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self.run.collect(self.criterion)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        self.run.stepping(optimizer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.run.watch(False)


class Ours:
    """A criterion, and our selection within the limits."""

    def __init__(self, task: Task, criterion: Criterion) -> None:
        example = as_example(task.module.example_input_array)
        graph = trace(task.net, *example[0], **example[1])
        self.criterion = criterion
        self.run = PruningSession(task.net, example, graph, DenseSizes.of(graph))

    def callbacks(self) -> list[L.Callback]:
        return [Look(self.run, self.criterion)]

    def cut(self, share: float) -> float:
        self.run.cut_(PruningPolicy({"macs": share}, limits=Limits(MOST, of="channels")), self.criterion)
        return self.run.graph.cost("macs") / self.run.dense.costs["macs"]


class Theirs:
    """torch-pruning's global pruner, in its many small steps until the MACs are reached."""

    def __init__(self, task: Task, importance: Callable[..., Any], most: float) -> None:
        self.task = task
        self.example = task.module.example_input_array
        self.dense = self._macs()
        self.pruner = tp.pruner.BasePruner(
            task.net,
            self.example,
            importance,
            global_pruning=True,
            pruning_ratio=1.0,
            max_pruning_ratio=most,
            iterative_steps=FINENESS,
            ignored_layers=[task.net.get_submodule(name) for name in task.outputs],
        )
        self.gradients = isinstance(importance, tp.importance.GroupTaylorImportance)

    def callbacks(self) -> list[L.Callback]:
        return []

    def cut(self, share: float) -> float:
        if self.gradients:
            self._accumulate()
        while self._macs() > share * self.dense and self.pruner.current_step < FINENESS:
            self.pruner.step()
        self.task.net.zero_grad(set_to_none=True)
        return self._macs() / self.dense

    def _macs(self) -> int:
        """Counted as for ours; without it the trace would be part of what is compared."""
        return conv_macs(self.task.net, self.example)

    def _accumulate(self) -> None:
        """The gradient of the training data, one pass, as torch-pruning's documentation has it."""
        self.task.net.train()
        self.task.net.zero_grad()
        for image, target, *_ in self.task.train:
            F.cross_entropy(self.task.net(image), target).backward()


def conv_macs(net: nn.Module, example: Any) -> int:
    """Multiply-accumulates of the convolutions and linear layers in one forward."""
    found = []

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        weight = module.get_parameter("weight")
        found.append(weight[0].numel() * output[0].numel())

    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    mode = net.training
    net.eval()(example)
    net.train(mode)
    for hook in hooks:
        hook.remove()
    return sum(found)


def ours(make: Callable[[int], Criterion]) -> Callable[[Task, int], Method]:
    return lambda task, seed: Ours(task, make(seed))


def theirs(make: Callable[[], Callable[..., Any]], most: float = 1.0) -> Callable[[Task, int], Method]:
    return lambda task, seed: Theirs(task, make(), most)


L2_OF_TP, TAYLOR_OF_TP = tp.importance.GroupMagnitudeImportance, tp.importance.GroupTaylorImportance
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
    "torch-pruning L2": theirs(L2_OF_TP),
    "torch-pruning Taylor": theirs(TAYLOR_OF_TP),
    "torch-pruning L2, limits": theirs(L2_OF_TP, MOST),
    "torch-pruning Taylor, limits": theirs(TAYLOR_OF_TP, MOST),
}
