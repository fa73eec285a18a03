"""The methods of the study: each cuts the network of a chain to the MACs of the next stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from benchmarks.quality.networks import Floors, Uniform, policy
from benchmarks.quality.peers import TorchPruning
from benchmarks.quality.plan import DEFAULT, OMEGAS
from benchmarks.quality.tasks import Task, score
from benchmarks.quality.training import LogitLoss, batches_of, cross_entropy
from lightning_prune import one_shot, trace
from lightning_prune.compensation import CompensationSettings
from lightning_prune.criteria import (
    IPAD,
    L1,
    L2,
    LAMP,
    Criterion,
    NormScale,
    OutputEnergy,
    OutputTaylor,
    Random,
    TaylorGate,
)
from lightning_prune.distillation import cwd, dist, hinton
from lightning_prune.netadapt import Rounds, search
from lightning_prune.pruning.training import Training
from lightning_prune.slimming import Penalty, slimmable

__all__ = ["METHODS", "Cutter", "Method", "Setting"]

RHO = 1e-3  # of the penalty on the scales of norms
NETADAPT = Rounds(rounds=6, decay=1.0, steps=1, blocks=6)  # of each stage
CANDIDATES = 72  # a stage's steps are divided by this: 36 candidates take half of them


@dataclass(frozen=True)
class Setting:
    """Circumstances of one chain.

    Attributes:
        task: data and numbers of steps.
        seed: of everything that is drawn.
        floors: channels that each layer keeps at least.
        repair: whether each cut is repaired.
    """

    task: Task
    seed: int
    floors: Floors
    repair: bool


class Cutter(Protocol):
    """A method at work on one network."""

    #: whether the method trains with a penalty before the first cut
    needs_sparsity: bool

    def cut(self, macs: float, stage: int) -> int:
        """Cut the network in place to ``macs``; return the number of training steps that this took."""
        ...

    def before_step(self) -> None:
        """Change the gradients of a training step."""
        ...


class Ours:
    """A criterion of this package with ``one_shot``."""

    needs_sparsity = False

    def __init__(self, net: nn.Module, setting: Setting, criterion: Criterion) -> None:
        self.net, self.setting, self.criterion = net, setting, criterion

    def cut(self, macs: float, stage: int) -> int:
        task = self.setting.task
        one_shot(
            self.net,
            task.example,
            policy(self.net, task.example, macs, self.setting.floors),
            self.criterion,
            task.calibration_batches(),
            cross_entropy,
            compensate=CompensationSettings() if self.setting.repair else False,  # training follows
        )
        return 0

    def before_step(self) -> None:
        """Leave the gradients as they are."""


class Slimming(Ours):
    """Network slimming: a penalty on the scales of norms in training, and a cut by the size of the scales."""

    needs_sparsity = True

    def __init__(self, net: nn.Module, setting: Setting) -> None:
        super().__init__(net, setting, NormScale())
        self._renew()

    def cut(self, macs: float, stage: int) -> int:
        super().cut(macs, stage)
        self._renew()
        return 0

    def before_step(self) -> None:
        """Add the gradient of the penalty."""
        self.penalty.add_(RHO)

    def _renew(self) -> None:
        graph = trace(self.net, self.setting.task.example)
        self.penalty = Penalty.of(graph, self.net, slimmable(graph, self.net), "macs")


class NetAdapt(Ours):
    """NetAdapt in six rounds per stage; candidates take about half of the steps of the stage."""

    def __init__(self, net: nn.Module, setting: Setting) -> None:
        super().__init__(net, setting, L2())

    def cut(self, macs: float, stage: int) -> int:
        task, seed = self.setting.task, 100 * self.setting.seed + stage
        held_out = task.data.train.first(task.after_cut)
        training = Training(
            list(batches_of(task.data.train, task.batch, 20, seed)),
            cross_entropy,
            lambda net: score(net, task, held_out).value,
        )
        steps = max(1, task.stage_steps[stage] // CANDIDATES)
        rule = policy(self.net, task.example, macs, self.setting.floors)
        result = search(
            self.net,
            task.example,
            rule,
            training,
            replace(NETADAPT, seed=seed, steps=steps),
            compensate=self.setting.repair,
            report=lambda line: None,
        )
        return result.steps


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        make: ``(network, setting) -> cutter``.
        repairs: settings of the repair that make sense.
        distil: loss that is added to the task's in each stage, of ``(student, teacher)`` logits.
        last: the smallest share of the MACs.
    """

    make: Callable[[nn.Module, Setting], Cutter]
    repairs: tuple[bool, ...] = (True, False)
    distil: LogitLoss | None = None
    last: float = 0.05


def ours(make: Callable[[int], Criterion], **options: Any) -> Method:
    """Return the method of a criterion, which is made from the seed."""
    return Method(lambda net, setting: Ours(net, setting, make(setting.seed)), **options)


def peer(**options: Any) -> Method:
    """Return a method of torch-pruning."""
    return Method(
        lambda net, setting: TorchPruning(net, setting.task, setting.floors, **options), repairs=(False,)
    )


def soft_targets(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss on class probabilities at temperature 1."""
    return hinton(student, teacher, temperature=1.0)


def published(omega: float) -> Callable[[int], Criterion]:
    """Return the maker of IPAD with the published terms."""
    return lambda seed: IPAD(omega)


def energy(omega: float) -> Callable[[int], Criterion]:
    """Return the maker of IPAD with terms of one scale."""
    return lambda seed: IPAD(omega, terms="energy")


METHODS: dict[str, Method] = {
    "random": ours(Random),
    "uniform L1": ours(lambda seed: Uniform(L1())),
    "uniform L2": ours(lambda seed: Uniform(L2())),
    "LAMP": ours(lambda seed: LAMP()),
    "Taylor": ours(lambda seed: TaylorGate()),
    "output Taylor": ours(lambda seed: OutputTaylor()),
    "output energy": ours(lambda seed: OutputEnergy()),
    **{f"IPAD, omega {w:g}": ours(published(w)) for w in OMEGAS},
    **{f"IPAD energy, omega {w:g}": ours(energy(w)) for w in OMEGAS},
    "slimming": Method(Slimming),
    "NetAdapt": Method(NetAdapt),
    "torch-pruning, local": peer(),
    "torch-pruning, global": peer(everywhere=True),
    "torch-pruning, GroupNormPruner": peer(everywhere=True, sparsity=True),
    **{
        f"{DEFAULT}, {name}": ours(energy(0.25), repairs=(True,), distil=kind, last=0.10)
        for name, kind in (("soft targets", soft_targets), ("CWD", cwd), ("DIST", dist))
    },
}
